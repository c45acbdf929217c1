"""Detects an unhealthy run: skipped steps in a row, and spikes of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

# A loss this many robust standard deviations above the median of recent losses is a spike.
SPIKE_DEVIATIONS = 6.0
WINDOW, ENOUGH = 50, 10


def skipped_in_a_row(records: Sequence[dict[str, Any]]) -> int:
    """The number of skipped steps at the end of ``records`` (lines of metrics.jsonl)."""
    count = 0
    for record in reversed(records):
        if not record.get("skipped_step"):
            break
        count += 1
    return count


def loss_spike(records: Sequence[dict[str, Any]], loss: float) -> float | None:
    """How many deviations ``loss`` lies above the median of recent steps. None: not a spike.

    The deviation is 1.4826 times the median distance to the median, so that one outlier does not
    change it. Skipped steps do not count.

    Args:
        records: lines of metrics.jsonl of the steps before.
    """
    recent = [r["loss"] for r in records[-WINDOW:] if not r.get("skipped_step")]
    if len(recent) < ENOUGH:
        return None
    middle = median(recent)
    deviation = 1.4826 * median(abs(value - middle) for value in recent)
    if deviation == 0 or not loss - middle > SPIKE_DEVIATIONS * deviation:
        return None
    return (loss - middle) / deviation
