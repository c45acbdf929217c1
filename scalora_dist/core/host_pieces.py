"""Merges into shards in the host's memory (CPU offload) on a GPU, piece by piece.

Piece i + 1 is copied up while piece i is merged and piece i − 1 is copied down. Each is in a slot
of its own in the GPU's memory. So the host's memory is read and written once, at the speed of the
bus. Copies go on from one weight to the next, until the host waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

SLOT_BYTES = 16 * 2**20
SLOTS = 3
# Merges into a range on the GPU: (weight, low, left, right, offset, cols), as ``HostPieces.add_``.
Merge = Callable[[Tensor, Tensor | None, Tensor, Tensor, int, int], None]

cuda = torch.cuda  # streams and events


class Place(NamedTuple):
    """Where a piece of W and its low half lie."""

    weight: Tensor  # 1-D
    low: Tensor | None  # int16, as long

    def is_pinned(self) -> bool:
        return self.weight.is_pinned() and (self.low is None or self.low.is_pinned())

    def copy_(self, source: Place, *, non_blocking: bool) -> None:
        for part, other in zip(self, source, strict=True):
            if part is not None and other is not None:
                part.copy_(other, non_blocking=non_blocking)


class Slot:
    """Room for one piece at a time.

    Attributes:
        bytes: its memory on the GPU, ``SLOT_BYTES``.
        staging: pinned memory of the same size, for pieces of a shard that is not pinned.
        up: recorded when the piece is on the GPU.
        merged: recorded when it is merged.
        down: recorded when it is in the host's memory again.
        unfinished: (from, to) of the copy that is left to the host; None: there is none.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = torch.empty(SLOT_BYTES, dtype=torch.uint8, device=device)
        self.staging: Tensor | None = None
        self.up = cuda.Event()
        self.merged = cuda.Event()
        self.down = cuda.Event()
        self.unfinished: tuple[Place, Place] | None = None

    def staged(self, like: Place) -> Place:
        """A place in pinned memory for a piece."""
        if self.staging is None:
            self.staging = pinned(SLOT_BYTES)
        return place_in(self.staging, like)

    def finish(self) -> None:
        """The host waits for the copy that is left to it, if there is one, and does it."""
        if self.unfinished:
            self.down.synchronize()
            source, target = self.unfinished
            target.copy_(source, non_blocking=False)
            self.unfinished = None


class HostPieces:
    """The streams and slots of one GPU. It keeps slots from the first piece until ``wait``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.up = cuda.Stream(device)
        self.down = cuda.Stream(device)
        self.slots: deque[Slot] = deque()

    def add_(
        self,
        weight: Tensor,
        low: Tensor | None,
        left: Tensor,
        right: Tensor,
        offset: int,
        cols: int,
        merge: Merge,
    ) -> None:
        """``W += left @ rightᵀ`` on a flat range of W in the host's memory.

        Call ``wait`` before the host reads the range, and before another merge into it. The host
        does not wait here, but for the pieces of a range that is not pinned.

        Args:
            weight: the range, 1-D, on the CPU.
            low: remainders for ``split``, on the CPU, int16, as long; None: there are none.
            left: full factor (rows, r) float32, on the GPU.
            right: full factor (cols, r) float32, on the GPU.
            offset: flat index of ``weight[0]`` in W.
            cols: number of columns of W.
            merge: merges into a range on the GPU.
        """
        if not weight.numel():  # of this weight the rank has nothing
            return
        main = cuda.current_stream(self.device)
        if not self.slots:
            self.slots.extend(Slot(self.device) for _ in range(SLOTS))
            self.up.wait_stream(main)  # which may still use the memory that was allocated now
        length = SLOT_BYTES // (weight.itemsize + (0 if low is None else 2))
        lows = repeat(None) if low is None else low.split(length)
        for piece in map(Place, weight.split(length), lows):
            slot = self.slots[0]
            self.slots.rotate(-1)
            on_gpu, on_host = place_in(slot.bytes, piece), piece
            if not piece.is_pinned():
                slot.finish()
                on_host = slot.staged(piece)
                on_host.copy_(piece, non_blocking=False)
                slot.unfinished = (on_host, piece)
            with cuda.stream(self.up):
                self.up.wait_event(slot.down)  # of the piece that was in this slot
                on_gpu.copy_(on_host, non_blocking=True)
                slot.up.record(self.up)
            main.wait_event(slot.up)
            merge(on_gpu.weight, on_gpu.low, left, right, offset, cols)
            slot.merged.record(main)
            with cuda.stream(self.down):
                self.down.wait_event(slot.merged)
                on_host.copy_(on_gpu, non_blocking=True)
                slot.down.record(self.down)
            offset += len(piece.weight)

    def wait(self) -> None:
        """The host waits until all shards are complete, and frees the slots.

        It waits once if they are pinned, else for the last piece of each slot too.
        """
        if self.slots:
            self.slots[-1].down.synchronize()  # the last piece comes down after all others
        for slot in self.slots:
            slot.finish()
        self.slots.clear()


def place_in(memory: Tensor, like: Place) -> Place:
    """The place in ``memory`` (``SLOT_BYTES``,) uint8 for a piece. Both parts begin aligned."""
    count, size = len(like.weight), like.weight.itemsize
    weight = memory.narrow(0, 0, count * size).view(like.weight.dtype)
    if like.low is None:
        return Place(weight, None)
    begin = SLOT_BYTES // (size + 2) * size
    return Place(weight, memory.narrow(0, begin, 2 * count).view(torch.int16))


def pinned(size: int) -> Tensor:
    """Pinned memory, (size,) uint8."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


_on_device: dict[torch.device, HostPieces] = {}


def on(device: torch.device) -> HostPieces:
    """What merges on this GPU."""
    if device not in _on_device:
        _on_device[device] = HostPieces(device)
    return _on_device[device]


def wait() -> None:
    """The host waits until every range is complete. It does not wait, where none is merged into."""
    for pieces in _on_device.values():
        pieces.wait()
