"""Adds tensors of a GPU to sums in the host's memory.

A part is copied to pinned memory while the part before it is added. The memory of two parts is used
in turn, so the sums themselves need no pinned memory, and the GPU keeps only the part.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from scalora_dist.core.host_pieces import pinned

cuda = torch.cuda  # streams and events


class Slot:
    """Pinned memory for one part at a time.

    Attributes:
        memory: (bytes of the largest part so far,) uint8.
        copied: recorded when the part is in ``memory``.
        unfinished: (sum, part in ``memory``) of the addition that is left to the host; None: none.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.copied = cuda.Event()
        self.unfinished: tuple[Tensor, Tensor] | None = None

    def begin(self, total: Tensor, part: Tensor, stream: torch.cuda.Stream) -> None:
        """Queue the copy of ``part``. The slot must be finished."""
        if len(self.memory) < part.nbytes:
            self.memory = pinned(part.nbytes)
        staged = self.memory[: part.nbytes].view(part.dtype).view(part.shape)
        staged.copy_(part, non_blocking=True)
        self.copied.record(stream)
        self.unfinished = total, staged

    def finish(self) -> None:
        """The host waits for the copy, if there is one, and adds it."""
        if self.unfinished:
            self.copied.synchronize()
            total, staged = self.unfinished
            total.add_(staged)
            self.unfinished = None


class HostSums:
    """Adds parts of one device, in the order of the calls. On a CPU it adds them at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.slots = deque([Slot(), Slot()] if device.type == "cuda" else [])

    def add_(self, total: Tensor, part: Tensor) -> None:
        """``total += part``. It is done at the next call but one, or at ``wait``.

        Args:
            total: the sum, contiguous, on the CPU. Only ``wait`` makes it complete.
            part: on the device, with the same shape and dtype, contiguous. It may be freed at once.
        """
        if not self.slots:
            total.add_(part)
            return
        self.slots[0].begin(total, part, cuda.current_stream(self.device))
        self.slots.rotate()
        self.slots[0].finish()  # of the call before

    def wait(self) -> None:
        """The host waits until all sums are complete."""
        for slot in self.slots:  # the older part is in the first
            slot.finish()
