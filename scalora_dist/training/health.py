"""Detects an unhealthy run: skipped steps in a row, and spikes of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

# A loss this many robust standard deviations above the median of recent losses is a spike.
SPIKE_DEVIATIONS = 6.0
WINDOW, ENOUGH = 50, 10


class Health:
    """What a run must remember of its last steps. A checkpoint holds it.

    Attributes:
        recent: losses of the last ``WINDOW`` steps, the newest last; None for a skipped step.
        skipped_in_a_row: number of skipped steps since the last one that was not skipped.
    """

    def __init__(self) -> None:
        self.recent: list[float | None] = []
        self.skipped_in_a_row = 0

    def note(self, record: Mapping[str, Any]) -> None:
        """Take a step into account.

        Args:
            record: the step's line of metrics.jsonl.
        """
        skipped = bool(record.get("skipped_step"))
        self.recent = [*self.recent, None if skipped else record["loss"]][-WINDOW:]
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def spike(self, loss: float) -> float | None:
        """How many deviations ``loss`` lies above the median of recent steps. None: not a spike.

        The deviation is 1.4826 times the median distance to the median, so that one outlier does
        not change it. Skipped steps do not count.
        """
        recent = [value for value in self.recent if value is not None]
        if len(recent) < ENOUGH:
            return None
        middle = median(recent)
        deviation = 1.4826 * median(abs(value - middle) for value in recent)
        if deviation == 0 or not loss - middle > SPIKE_DEVIATIONS * deviation:
            return None
        return (loss - middle) / deviation
