"""Summarizes a run: the contents of summary.json, and the table shown at its end."""

from __future__ import annotations

from collections import Counter
from typing import Any

from scalora_dist.config.options import Options
from scalora_dist.training.evaluate import Evaluation


def summarize(
    options: Options,
    records: list[dict[str, Any]],
    before: Evaluation | None,
    after: Evaluation | None,
    *,
    world_size: int,
    rank: int | None,
    parameters: int,
    update_rank: list[int],
    carry: dict[str, Any],
    peak_memory_bytes: int,
) -> dict[str, Any]:
    """The contents of summary.json.

    Args:
        options: all options of the run.
        records: the steps' lines of metrics.jsonl.
        before: the evaluation before the first step, or None.
        after: the evaluation after the last step, or None.
        world_size: number of ranks.
        rank: r of the factors that the method adds, or None if it has no rank.
        parameters: number of trained parameters of the full model.
        update_rank: ranks of the accumulated updates of the measured layers.
        carry: number of columns (min, mean, max) and the largest lost share, or empty.
        peak_memory_bytes: peak memory in bytes of the rank that needed most.
    """
    timed = records[1:] or records  # the first step also sets up kernels and buffers
    seconds = sum(record["seconds"] for record in timed)
    rescales = [record["rescale"] for record in records if "rescale" in record]
    rules: Counter[str] = Counter()
    for rescale in rescales:
        rules.update({rule: count for rule, count in rescale.items() if rule != "seconds"})
    # The metrics of transforms and restarts.
    own = [value for record in timed for value in record.values() if isinstance(value, dict)]
    own_seconds = sum(said.get("seconds", 0.0) for said in own)
    return {
        "method": options.method.name,
        "scaling_rule": options.method.scaling_rule if rules else None,
        "rank": rank,
        "trained_parameters": parameters,
        "world_size": world_size,
        "steps": len(records),
        "skipped_steps": sum("skipped_step" in record for record in records),
        "loss_first": records[0]["loss"],
        "loss_last": records[-1]["loss"],
        "eval_examples": after.examples if after else None,
        "eval_loss": [before.loss, after.loss] if before and after else None,
        "eval_exact_match": [before.exact_match, after.exact_match] if before and after else None,
        "layers_by_rule": dict(rules),
        "update_rank": update_rank,
        "carry": carry,
        "seconds_per_step": seconds / len(timed),
        "method_share": own_seconds / seconds,
        "tokens_per_second": sum(record["tokens"] for record in timed) / seconds,
        "peak_memory_bytes": peak_memory_bytes,
        "output_dir": options.train.output_dir,
    }


def render(summary: dict[str, Any]) -> str:
    """The summary as an aligned table of two columns."""
    rows = []
    if summary["eval_loss"]:
        held_out = f"held-out {{}} ({summary['eval_examples']} examples)"
        loss, match = summary["eval_loss"], summary["eval_exact_match"]
        rows.append((held_out.format("loss"), f"{loss[0]:.3f} → {loss[1]:.3f}"))
        rows.append((held_out.format("exact match"), f"{match[0]:.1%} → {match[1]:.1%}"))
    rows.append(("training loss", f"{summary['loss_first']:.3f} → {summary['loss_last']:.3f}"))
    rules = dict(summary["layers_by_rule"])
    if kept := rules.pop("kept", 0):
        share = kept / (kept + sum(rules.values()))
        rows.append(("merges saved", f"{share:.0%} of all layers' rescales"))
    if total := sum(rules.values()):
        shares = ", ".join(f"{rule} {n / total:.0%}" for rule, n in rules.items() if n)
        rows.append(("rule taken, share of all layers' rescales", shares))
    if ranks := summary["update_rank"]:
        spread = f"{min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.0f}"
        factors = f"factors: {summary['rank']}; " if summary["rank"] else ""
        of = f"({factors}{len(ranks)} layers measured)"
        rows.append(("rank of the accumulated update", f"{spread} {of}"))
    if carry := summary["carry"]:
        least, mean, most = carry["columns"]
        columns = f"{least} to {most}, mean {mean:.0f} columns"
        rows.append(("carry", f"{columns}; lost at most {carry['lost_max']:.1e} of an update"))
    rows.append(("trained parameters", f"{summary['trained_parameters']:,}"))
    own = summary["method_share"]
    share = f", {summary['method']}'s own work {own:.1%} of it" if own else ""
    rows.append(("time per step", f"{summary['seconds_per_step']:.2f} s{share}"))
    rows.append(("tokens per second", f"{summary['tokens_per_second']:.0f}"))
    if summary["skipped_steps"]:
        rows.append(("skipped steps", f"{summary['skipped_steps']} of {summary['steps']}"))
    rows.append(("peak memory of a rank", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"))
    rows.append(("results", f"{summary['output_dir']}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
