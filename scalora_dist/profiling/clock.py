"""Measures the seconds of each part of a step."""

from __future__ import annotations

import time

import torch


class Clock:
    """No-op timer. Code calls ``begin(part)`` as each part starts; ``Stopwatch`` measures them."""

    def begin(self, part: str) -> None:
        """End the current part and begin ``part``."""


def now(device: torch.device) -> float:
    """Time in seconds, read once ``device`` has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stopwatch(Clock):
    """Measures the seconds of each part on this rank, until its device has finished the part.

    Attributes:
        device: device of this rank.
        seconds: {part: seconds}, the sum where a part occurs more than once.
        part: name of the current part; None: no part is running.
        since: time at which the current part began, seconds.
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
        """End the current part; no part follows."""
        ended = now(self.device)
        if self.part is not None:
            self.seconds[self.part] = self.seconds.get(self.part, 0.0) + ended - self.since
        self.part, self.since = None, ended
