"""FlatShard: one rank's contiguous flat range of a row-major matrix, and operations on it.

ZeRO-3 keeps ``ceil(numel / world)`` elements per rank. ZeRO-1/2 keep pieces of a flattened buffer,
which may begin and end inside a row. FSDP2 keeps complete rows. A single process keeps everything.
Each of them is a ``FlatShard``, so the code that uses this file is the same for all engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Piece(NamedTuple):
    """A rectangular block of the matrix on this rank, as a view: writes change the shard."""

    block: Tensor  # (rows, cols) view of FlatShard.local
    rows: slice  # in the full matrix
    cols: slice  # in the full matrix
    flat: slice  # in FlatShard.local


@dataclass(frozen=True)
class FlatShard:
    """This rank's elements ``[offset, offset + local.numel())`` of a row-major matrix.

    Attributes:
        local: 1-D view of the engine's own storage, any float dtype. Writes change that storage.
        offset: flat index of ``local[0]`` in the full matrix.
        shape: (rows, cols) of the full matrix.
        group: process group over which the matrix is sharded; None: this rank holds all of it.
    """

    local: Tensor
    offset: int
    shape: tuple[int, int]
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        end = self.offset + self.local.numel()
        if self.local.dim() != 1 or end > self.shape[0] * self.shape[1]:
            raise ValueError(f"range [{self.offset}, {end}) does not lie in {self.shape}")
        if self.group is None and self.local.numel() != self.shape[0] * self.shape[1]:
            raise ValueError(f"a shard without a group must be the whole {self.shape}")

    def like(self, local: Tensor) -> FlatShard:
        """A shard of the same range and shape on ``local``: of a gradient, a moment or a copy."""
        return FlatShard(local, self.offset, self.shape, self.group)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's range of the full matrix ``whole`` (rows, cols), 1-D."""
        return whole.reshape(-1)[self.offset : self.offset + self.local.numel()]

    def write_(self, whole: Tensor) -> None:
        """Copy this rank's range of the full matrix ``whole`` (rows, cols) into the shard.

        ``whole`` may have any dtype and device. No communication.
        """
        self.local.copy_(self.own(whole))

    def pieces(self, max_rows: int | None = None) -> Iterator[Piece]:
        """The range as rectangles: a partial row, full rows (up to ``max_rows``), a partial row."""
        cols = self.shape[1]
        position, end = self.offset, self.offset + self.local.numel()
        while position < end:
            row, start = divmod(position, cols)
            if start or end - position < cols:  # a partial row, at either end
                rows, width = 1, min(cols - start, end - position)
            else:
                rows, width = (end - position) // cols, cols
                rows = min(rows, max_rows) if max_rows else rows
            flat = slice(position - self.offset, position - self.offset + rows * width)
            yield Piece(
                self.local[flat].view(rows, width),
                slice(row, row + rows),
                slice(start, start + width),
                flat,
            )
            position += rows * width

    def add_low_rank_(self, left: Tensor, right: Tensor) -> None:
        """``M += left @ rightᵀ`` on this rank's range. No communication.

        Args:
            left: full factor (rows, r), in ``local``'s dtype and on its device.
            right: full factor (cols, r), likewise.
        """
        for piece in self.pieces():
            piece.block.addmm_(left[piece.rows], right[piece.cols].T)

    def padded_rows(self) -> tuple[int, Tensor]:
        """The rows that overlap this rank's range, with zeros for elements of other ranks.

        Returns:
            (index of the first row, the rows (touched rows, cols)). The rows are a view where the
            range begins and ends with full rows, else a copy.
        """
        cols = self.shape[1]
        first, head = divmod(self.offset, cols)
        tail = -(head + self.local.numel()) % cols
        rows = torch.nn.functional.pad(self.local, (head, tail)) if head or tail else self.local
        return first, rows.view(-1, cols)
