"""Seconds by part."""

from __future__ import annotations

import time

import torch


class Clock:
    """Seconds of this rank by part, what its device had still to do included.

    Attributes:
        seconds: {part: seconds}, added up where a part comes more than once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.last = self._now()

    def lap(self, part: str) -> None:
        """Everything since the last lap, or since the start, was ``part``."""
        now = self._now()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
