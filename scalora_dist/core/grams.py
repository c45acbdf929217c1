"""Grams of sharded matrices, and products of their rows with small matrices.

No rank can multiply a row that lies on several ranks. A range has at most two such rows, its first
and its last. So before the sums, the ranks that share a row exchange their parts: one all-to-all
for all matrices, in which neighbours send and receive at most two rows a matrix. Each of them then
has the complete row, and the rank on which it begins adds it to the gram. The parts do not go into
the all-reduce of the grams: every rank would send and receive the split rows of all ranks (31 of 33
MiB for Gemma-3-12B at r = 8 on 1,024 ranks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from scalora_dist.core import host
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.layout import Batch, Group, Layout

# Makes k matrices of a batch side by side: (k, elements), any float dtype, on the layout's device.
Columns: TypeAlias = Callable[[Batch], Tensor]


class Grams(NamedTuple):
    """Grams of X = [M, …] of each matrix, and the rows of X that this rank shares with others.

    Attributes:
        sums: XᵀX, (matrices, k·cols, k·cols) float64, summed over all ranks.
        squares: sums of squares of each column of one more matrix, likewise: (matrices, cols)
            float64; (matrices, 0) if they were not asked for.
        ends: the complete first and last rows of this rank's ranges, where other ranks have a part
            of them, else zero: (matrices, 2, k·cols) float64.
    """

    sums: Tensor
    squares: Tensor
    ends: Tensor


@dataclass(frozen=True)
class GramSums:
    """Computes grams of a layout's matrices, which have one number of columns.

    Attributes:
        layout: which rank holds which range.
    """

    layout: Layout

    @cached_property
    def cols(self) -> int:
        (cols,) = {cols for _, cols in self.layout.shapes}
        return cols

    @cached_property
    def shared(self) -> tuple[Tensor, list[int]]:
        """The exchange of split rows: (their places in ``Grams.ends``, the number for each rank).

        The places are those of (2·matrices) rows, sorted by rank, then by matrix. Two ranks share
        at most one row of a matrix. So each receives the same rows from the other that it sends.
        """
        low, high = np.moveaxis(self.layout.ranges, 2, 0)  # (world, matrices)
        mine = self.layout.rank
        first, last = low[mine] // self.cols, (high[mine] - 1) // self.cols
        rows = np.stack([first, last], axis=1)  # (matrices, 2)
        begin = np.maximum(low[:, :, None], rows * self.cols)
        end = np.minimum(high[:, :, None], (rows + 1) * self.cols)
        together = (end > begin) & (high > low)[mine, :, None]
        together[:, :, 1] &= first != last
        together[mine] = False
        _, matrix, which = together.nonzero()
        places = host.to_device(torch.from_numpy(2 * matrix + which), self.layout.device)
        return places, together.sum((1, 2)).tolist()

    @cached_property
    def begun(self) -> Tensor:
        """1 for each row of ``Grams.ends`` that begins on this rank, else 0: (matrices, 2, 1)."""
        low = self.layout.ranges[self.layout.rank, :, 0]
        begun = torch.ones(len(low), 2, 1, dtype=torch.float64)
        begun[:, 0, 0] = torch.from_numpy(low % self.cols == 0)
        return host.to_device(begun, self.layout.device)

    @cached_property
    def any_shared(self) -> bool:
        """Whether any row of any matrix lies on several ranks. The same on every rank."""
        low, high = np.moveaxis(self.layout.ranges, 2, 0)
        return bool(((low % self.cols != 0) & (high > low)).any())

    def __call__(self, columns: Columns, k: int, *, squares: bool = False) -> Grams:
        """The grams of X = [M, …] of all matrices. One all-reduce, and one all-to-all before it.

        There is no all-to-all where every rank has complete rows only.

        Args:
            columns: makes the k matrices of X for one batch.
            squares: whether it makes one more, of which only the squares of columns are summed.
        """
        layout, matrices, width = self.layout, len(self.layout.shapes), k * self.cols
        sizes = [matrices * width**2, matrices * self.cols * squares]
        message = torch.zeros(sum(sizes), dtype=torch.float64, device=layout.device)
        flat_sums, flat_squares = message.split(sizes)
        sums, squared = flat_sums.view(-1, width, width), flat_squares.view(matrices, -1)
        ends = message.new_zeros(matrices, 2 if self.any_shared else 0, width)
        for batch in layout.batches:
            values = columns(batch)
            for group, rows in self._rows_of(batch, values[:k]):
                for end, place in self._cut(group):
                    ends[:, end].index_copy_(0, group.index, rows[:, place])
                    rows[:, place] = 0
                sums.index_copy_(0, group.index, rows.mT @ rows)
            for group, rows in self._rows_of(batch, values[k:]) if squares else ():
                squared.index_copy_(0, group.index, rows.square_().sum(1))
        if self.any_shared:
            self._complete(ends)
            counted = ends * self.begun
            sums.baddbmm_(counted.mT, counted)
        if layout.group is not None:
            dist.all_reduce(message, group=layout.group)
        return Grams(sums, squared, ends)

    def mixed(
        self, columns: Columns, grams: Grams, mixes: Tensor
    ) -> Iterator[tuple[Batch, Tensor]]:
        """X times a small matrix for each matrix: per batch, this rank's elements in one buffer.

        No communication.

        Args:
            columns: as for the call that gave ``grams``.
            mixes: (matrices, k·cols, cols) float64 on the layout's device.

        Yields:
            (batch, elements (elements,) float64), as ``Layout.unpack`` takes them.
        """
        for batch in self.layout.batches:
            parts = []
            for group, rows in self._rows_of(batch, columns(batch)):
                for end, place in self._cut(group):
                    rows[:, place] = grams.ends[:, end].index_select(0, group.index)
                values = (rows @ mixes.index_select(0, group.index)).flatten(1)
                parts.append(values[:, group.head : group.head + group.length].flatten())
            yield batch, torch.cat(parts)

    def _rows_of(self, batch: Batch, values: Tensor) -> Iterator[tuple[Group, Tensor]]:
        """Per group, the touched rows of X: (matrices, rows, k·cols) float64, a copy.

        Elements of other ranks are zero.
        """
        for group in batch:
            part = values[:, group.flat].view(len(values), len(group.which), group.length)
            if group.head or group.tail:
                part = F.pad(part, (group.head, group.tail))
            part = part.view(len(values), len(group.which), group.rows, group.cols)
            rows = part.new_empty(
                len(group.which), group.rows, len(values), group.cols, dtype=torch.float64
            )
            yield group, rows.copy_(part.permute(1, 2, 0, 3)).flatten(2)

    def _cut(self, group: Group) -> list[tuple[int, int]]:
        """The rows of a group's ranges that other ranks share: (0 first or 1 last, its place)."""
        if group.rows == 1:
            return [(0, 0)] if group.head or group.tail else []
        return [(0, 0)] * bool(group.head) + [(1, group.rows - 1)] * bool(group.tail)

    def _complete(self, ends: Tensor) -> None:
        """Add the parts that other ranks have of the rows ``ends``. One all-to-all."""
        places, counts = self.shared
        mine = ends.view(-1, ends.shape[2])
        sent = mine.index_select(0, places)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, counts, counts, group=self.layout.group)
        # An element lies on one rank: the sums have one term that is not zero.
        mine.index_add_(0, places, received)


def packed(layout: Layout, lists: Sequence[Sequence[FlatShard]], dtype: torch.dtype) -> Columns:
    """The columns [M, …] of lists of shards, one list for each of the k matrices of X."""

    def columns(batch: Batch) -> Tensor:
        values = torch.empty(len(lists), batch[-1].flat.stop, dtype=dtype, device=layout.device)
        for row, shards in zip(values, lists, strict=True):
            layout.pack(batch, shards, out=row)
        return values

    return columns
