"""Formats a profile for the terminal at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MEMORY = {  # labels of what ``state_bytes`` and ``gradient_bytes`` count
    "base": "base weights",
    "low_halves": "low halves of merged weights",
    "carry": "carry",
    "adapters": "adapters as the forward reads them",
    "masters": "masters of trained parameters",
    "moments": "AdamW's moments",
    "gradients": "gradients",
}


def render_profile(report: dict[str, Any]) -> str:
    """A table of a step's time and a rank's memory.

    Args:
        report: contents of profile.json.
    """
    of, share = report["median"], report["share"]
    parts, peaks, communication = dict(of["parts"]), of["peak"], of["communication"]
    parts["rest"] = parts.pop("rest")  # moved to the end
    rows = [("", "ms", "share", "slowest rank", "peak GiB" if peaks else "")]
    for part, seconds in parts.items():
        peak = f"{peaks[part] / 2**30:.2f}" if part in peaks else ""
        rows.append((part, _ms(seconds), f"{share[part]:.1%}", _ms(of["slowest"][part]), peak))
    rows.append(("step", "", "", _ms(of["step"]), ""))
    for name, key in (("communication", "seconds"), ("  not overlapped", "exposed")):
        slowest = _ms(communication["slowest"]) if key == "seconds" else ""
        own = f"{report['communication_share'][key]:.1%}"
        rows.append((name, _ms(communication[key]), own, slowest, ""))
    speed = f"{of['tokens_per_second']:,.0f} tokens/s"
    if "tflops" in of:
        speed += f", {of['tflops']:.3g} TFLOP/s a rank"
    if "mfu" in of:
        speed += f", {of['mfu']:.1%} of the device's {report['peak_tflops']:g} (MFU)"
    kept = {MEMORY[part]: count for part, count in of["memory"].items() if count}
    lines = [
        f"{report['steps']} step(s) on {report['ranks']} rank(s), medians of those with the part:",
        *_aligned(rows),
        f"  {speed}",
        "what a rank keeps, MiB (the rank with most):",
        *_aligned([(part, f"{count / 2**20:,.1f}") for part, count in kept.items()]),
        *(f"  {path}" for path in (*report["traces"], *report["snapshots"])),
    ]
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines: the first column aligned left, the others right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for name, *values in rows:
        cells = [value.rjust(width) for value, width in zip(values, others, strict=True)]
        lines.append("  ".join(["", name.ljust(first), *cells]).rstrip())
    return lines
