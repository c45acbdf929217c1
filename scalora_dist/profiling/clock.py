"""Seconds by part."""

from __future__ import annotations

import time

import torch


class Clock:
    """What work tells which part of it begins; this one does not listen, and costs nothing."""

    def begin(self, part: str) -> None:
        """What went on until now is over; what follows is ``part``."""


def now(device: torch.device) -> float:
    """Seconds, once ``device`` has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stopwatch(Clock):
    """Seconds of this rank by part, what its device had still to do included.

    Attributes:
        seconds: {part: seconds}, added up where a part comes more than once.
        part: that goes on now; None: none does.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.part: str | None = None
        self.since = 0.0

    def begin(self, part: str) -> None:
        self.end()
        self.part = part

    def end(self) -> None:
        """What went on until now is over, and nothing follows."""
        ended = now(self.device)
        if self.part is not None:
            self.seconds[self.part] = self.seconds.get(self.part, 0.0) + ended - self.since
        self.part, self.since = None, ended
