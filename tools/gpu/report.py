"""The report of `tools/bench_gpu.py`: device, versions, how each part ended, and the goals.

Only the standard library is used, so that a part that cannot start is reported too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

Found = dict[str, dict[str, Any]]


class Goal(NamedTuple):
    """One goal and what was measured.

    Attributes:
        what: the goal in words.
        measured: the measured figure in words; "": not measured.
        met: whether the goal is met.
    """

    what: str
    measured: str = ""
    met: bool = False


def report(machine: dict[str, Any], found: Found) -> str:
    """The report as Markdown.

    Args:
        machine: what ``tools/gpu/machine.py`` wrote.
        found: {part: its figures, with "ended" and "part_seconds"}.
    """
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    count = machine["gpus"]
    lines = [
        f"Device: {f'{count} × ' if count else ''}{machine['device']}",
        f"Versions: {versions}",
    ]
    if machine["unsupported"]:
        lines.append(f"Not supported: {', '.join(machine['unsupported'])}")
    if not count:
        lines += ["", "No GPU was found. Small forms ran on the CPU, and no figure counts."]
    lines += ["", "| part | ended | seconds |", "|---|---|---|"]
    lines += [f"| {part} | {x['ended']} | {x['part_seconds']:.0f} |" for part, x in found.items()]
    for part in ("first", "tests"):
        if rows := found.get(part, {}).get("rows"):
            counts = [sum(r["outcome"] == o for r in rows) for o in ("passed", "failed", "skipped")]
            lines += ["", "{}: {} passed, {} failed, {} skipped".format(part, *counts)]
            told = ("failed", "skipped") if part == "first" else ("failed",)
            lines += [
                f"* {r['outcome']}: {r['check']}: {r['why']}" for r in rows if r["outcome"] in told
            ]
    lines += ["", "| goal | measured | |", "|---|---|---|"]
    for goal in goals(found if count else {}):
        verdict = ("met" if goal.met else "NOT MET") if goal.measured else "not measured"
        lines.append(f"| {goal.what} | {goal.measured} | {verdict} |")
    for table in (merge_table, loss_table, rescale_table, step_table):
        lines += table(found)
    return "\n".join(lines) + "\n"


def merge_table(found: Found) -> Iterator[str]:
    if rows := found.get("merge", {}).get("rows"):
        rate = found["merge"]["copy_bytes_per_second"] / 1e9
        yield f"\nA copy: {rate:,.0f} GB/s, read and written."
        heads = ("merge", "r", "all weights, ms", "by PyTorch's operators", "GB/s", "of a copy")
        yield f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
    for row in rows or []:
        rate = row["model_bytes"] / row["model_seconds"] / 1e9
        times = [f"{1e3 * row[key]:.1f}" for key in ("model_seconds", "pytorch_seconds")]
        cells = (row["kind"], str(row["rank"]), *times, f"{rate:,.0f}", f"{row['of_copy']:.1%}")
        yield f"| {' | '.join(cells)} |"


def loss_table(found: Found) -> Iterator[str]:
    if rows := found.get("loss", {}).get("rows"):
        yield "\n| loss of a micro-batch | ms | peak, GB |\n|---|---|---|"
    for row in rows or []:
        yield f"| {row['way']} | {1e3 * row['seconds']:.1f} | {row['peak_bytes'] / 1e9:.2f} |"


def rescale_table(found: Found) -> Iterator[str]:
    if rows := found.get("rescale", {}).get("rows"):
        parts = list(rows[0]["parts"])
        heads = ["rescale, ms: layers", "projections", "r", "whole", *parts]
        yield f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
    for row in rows or []:
        times = [row["seconds"], *row["parts"].values()]
        cells = [row["layers"], row["projections"], row["rank"], *(f"{1e3 * t:.1f}" for t in times)]
        yield f"| {' | '.join(map(str, cells))} |"


def step_table(found: Found) -> Iterator[str]:
    for part in ("step", "ranks"):
        if not (rows := found.get(part, {}).get("rows")):
            continue
        sizes, model = found[part]["sizes"], found[part]["model"]
        yield (
            f"\n{model['blocks']} blocks of width {model['hidden_size']}, {sizes['examples']} × "
            f"{sizes['length']} tokens a step, {sizes['micro_batch']} examples at once."
        )
        heads = (part, "ms", "with a rescale", "tokens/s", "MFU", "peak, GB", "planned, GB")
        yield f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
        for name, row in rows.items():
            if "error" in row:
                yield f"| {name} | failed: {row['error']} |{' |' * (len(heads) - 2)}"
                continue
            cells = (
                name,
                f"{1e3 * row['plain_seconds']:.1f}",
                f"{1e3 * row['rescale_seconds']:.1f}" if "rescale_seconds" in row else "",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['mfu']:.1%}" if "mfu" in row else "",
                f"{row['peak_bytes'] / 1e9:.2f}",
                f"{row['planned_bytes'] / 1e9:.2f}" if "planned_bytes" in row else "",
            )
            yield f"| {' | '.join(cells)} |"


def goals(found: Found) -> Iterator[Goal]:
    """The goals for an H100 or H200, each with its figure where the parts measured one."""
    yield _merge(found.get("merge", {}).get("rows", []))
    rows = found.get("step", {}).get("rows", {})
    rows = {name: row for name, row in rows.items() if "error" not in row}
    lora, scalora, nf4 = (rows.get(name) for name in ("lora", "scalora", "scalora-nf4"))
    yield from _rescale(lora, scalora)
    yield _memory(lora, scalora)
    yield _peft(lora, [rows.get("peft-lora"), rows.get("peft-alone")])
    for name, row in (("LoRA", lora), ("ScaLoRA", scalora), ("ScaLoRA on NF4", nf4)):
        yield _plan(name, row)
    yield _ranks(found.get("ranks", {}).get("rows", {}))


def _merge(rows: list[dict[str, Any]]) -> Goal:
    what = "merge (`split`, r = 8, all weights): at least 85 % of a device copy's rate"
    for row in rows:
        if (row["kind"], row["rank"]) == ("split", 8):
            return Goal(what, f"{row['of_copy']:.1%}", row["of_copy"] >= 0.85)
    return Goal(what)


def _rescale(lora: dict[str, Any] | None, scalora: dict[str, Any] | None) -> Iterator[Goal]:
    """What a rescale adds to a step, from ScaLoRA's run; and its step without one against LoRA's.

    In ScaLoRA's run steps with a rescale and steps without one take turns. At interval 10 one step
    in ten has a rescale.
    """
    added = None
    if scalora:
        added = scalora["rescale_seconds"] / scalora["plain_seconds"] - 1
    for interval, limit in ((1, 0.02), (10, 0.003)):
        what = (
            f"ScaLoRA at interval {interval}: at most {limit:.1%} over the step without a rescale"
        )
        yield (
            Goal(what)
            if added is None
            else Goal(what, f"{added / interval:+.2%}", added / interval <= limit)
        )
    what = "ScaLoRA's step without a rescale: LoRA's time within 1 %"
    if not (lora and scalora):
        yield Goal(what)
        return
    apart = scalora["plain_seconds"] / lora["plain_seconds"] - 1
    yield Goal(what, f"{apart:+.2%}", apart <= 0.01)


def _memory(lora: dict[str, Any] | None, scalora: dict[str, Any] | None) -> Goal:
    what = "ScaLoRA's memory over LoRA's: at most 1 % beyond the 2 bytes a weight of `split`"
    if not (lora and scalora):
        return Goal(what)
    beyond = scalora["peak_bytes"] - lora["peak_bytes"] - scalora["low_half_bytes"]
    share = beyond / lora["peak_bytes"]
    return Goal(what, f"{share:+.2%}", share <= 0.01)


def _peft(lora: dict[str, Any] | None, others: list[dict[str, Any] | None]) -> Goal:
    what = "LoRA's step: within 1 % not slower than PEFT's (in this trainer; with DeepSpeed alone)"
    times = [row["plain_seconds"] for row in others if row]
    if not (lora and times):
        return Goal(what)
    ratios = [lora["plain_seconds"] / time for time in times]
    return Goal(what, ", ".join(f"{ratio:.2f} ×" for ratio in ratios), max(ratios) <= 1.01)


def _plan(name: str, row: dict[str, Any] | None) -> Goal:
    what = f"{name}: plan within 10 % of the allocator's peak"
    if row is None:
        return Goal(what)
    off = row["planned_bytes"] / row["peak_bytes"] - 1
    return Goal(what, f"{off:+.1%}", abs(off) <= 0.1)


def _ranks(rows: dict[str, dict[str, Any]]) -> Goal:
    what = "several ranks: losses within 0.1 % of one rank's, gradient norms within 5 %"
    if failed := [name for name, row in rows.items() if "error" in row]:
        return Goal(what, f"failed: {', '.join(failed)}")
    compared = [row for row in rows.values() if "losses_off" in row]
    if not compared:
        return Goal(what)
    losses = max(row["losses_off"] for row in compared)
    norms = max(row["grad_norms_off"] for row in compared)
    return Goal(what, f"{losses:.2%}, {norms:.1%}", losses <= 1e-3 and norms <= 0.05)
