"""FlatShard: one rank's contiguous flat range of a row-major matrix, and operations on it.

ZeRO-3 keeps ``ceil(numel / world)`` elements per rank. ZeRO-1/2 keep pieces of a flattened buffer,
which may begin and end inside a row. FSDP2 keeps complete rows. A single process keeps everything.
Each of them is a ``FlatShard``, so the code that uses this file is the same for all engines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Limit in bytes of one all-gather of factors. A single group of matrices may exceed it.
GATHER_BUCKET_BYTES = 128 * 2**20


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

    def write_(self, whole: Tensor) -> None:
        """Copy this rank's range of the full matrix ``whole`` (rows, cols) into the shard.

        ``whole`` may have any dtype and device. No communication.
        """
        end = self.offset + self.local.numel()
        self.local.copy_(whole.reshape(-1)[self.offset : end])

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

    def scale_columns_(self, scale: Tensor) -> None:
        """Multiply column k by ``scale[k]`` (shape (cols,), any float dtype). No communication."""
        # A 16-bit shard is scaled in fp32 and rounded once.
        scale = scale.to(self.local.device, torch.promote_types(self.local.dtype, torch.float32))
        for piece in self.pieces():
            piece.block.mul_(scale[piece.cols])

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

    def full_tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """The full matrix (rows, cols) on every rank, on ``device``. Two all-gathers.

        Without a group: a view of ``local`` on its own device, no communication.
        """
        return Layout.of([self], device).gather([self], range(1))[0]

    def gram(self, *others: FlatShard) -> Tensor:
        """``[M, others…]ᵀ [M, others…]``, float64, the same on every rank.

        One all-gather and one all-reduce. For many matrices, use one ``Layout`` and its ``grams``:
        it takes one all-reduce for all of them.
        """
        return Layout.of([self]).grams([(self, *others)])[0]


@dataclass(frozen=True)
class Layout:
    """The ranges of a list of matrices on all ranks. Exchanged once, because they never change.

    Attributes:
        shapes: (rows, cols) of each full matrix.
        ranges: flat range ``[lo, hi)`` of matrix i on rank p, (world, matrices, 2) int64, CPU.
        split: for each matrix, the indices of the rows that lie on more than one rank, 1-D int64.
        order: for each matrix, the ranks sorted by the start of their range.
        group: process group over which all matrices are sharded; None: every rank holds them all.
        device: device of communication buffers (the accelerator with NCCL, the CPU with gloo).
    """

    shapes: list[tuple[int, int]]
    ranges: Tensor
    split: list[Tensor]
    order: list[list[int]]
    group: dist.ProcessGroup | None
    device: torch.device

    @classmethod
    def of(cls, shards: Sequence[FlatShard], device: torch.device | str = "cpu") -> Layout:
        """Exchange the ranges of ``shards`` (same order on every rank). One all-gather.

        Raises:
            ValueError: the shards do not share one group.
        """
        device = torch.device(device)
        groups = {shard.group for shard in shards}
        if len(groups) != 1:
            raise ValueError("the matrices of one layout must share one process group")
        group = groups.pop()
        mine = torch.tensor(
            [(shard.offset, shard.offset + shard.local.numel()) for shard in shards], device=device
        )
        everyone = mine[None]
        if group is not None:
            everyone = _all_gather(mine.flatten(), group).view(-1, *mine.shape)
        everyone = everyone.cpu()
        shapes = [shard.shape for shard in shards]
        split = [split_rows(everyone[:, i], cols) for i, (_, cols) in enumerate(shapes)]
        order = everyone[..., 0].T.argsort(dim=1, stable=True).tolist()
        return cls(shapes, everyone, split, order, group, device)

    def only(self, which: Sequence[int]) -> Layout:
        """The layout of the matrices with the indices ``which``. No communication."""
        return replace(
            self,
            shapes=[self.shapes[i] for i in which],
            ranges=self.ranges[:, list(which)],
            split=[self.split[i] for i in which],
            order=[self.order[i] for i in which],
        )

    def grams(self, stacks: Sequence[Sequence[FlatShard]]) -> list[Tensor]:
        """``XᵀX`` of each matrix, where X is its stack, concatenated by columns. ONE all-reduce.

        Args:
            stacks: per matrix, one or more shards with that matrix's range (M, its gradient, …).

        Returns:
            per matrix, its gram (k·cols, k·cols) float64 on ``device``; its stack has k shards.
        """
        return self.grams_and_split_rows(stacks)[0]

    def grams_and_split_rows(
        self, stacks: Sequence[Sequence[FlatShard]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The result of ``grams``, and the split rows of each X. ONE all-reduce for both.

        No rank can multiply a row that lies on two ranks. Each rank writes its part of the row into
        a slot of the all-reduced buffer. The all-reduce returns the complete rows, and every rank
        adds their product to the gram.

        Returns:
            (grams, per matrix the complete rows ``split`` of X (split rows, k·cols) float64).
        """
        widths = [len(stack) * cols for stack, (_, cols) in zip(stacks, self.shapes, strict=True)]
        sizes = [
            width * (width + len(rows)) for width, rows in zip(widths, self.split, strict=True)
        ]
        message = torch.zeros(sum(sizes), dtype=torch.float64, device=self.device)
        for part, stack, width, split in zip(
            message.split(sizes), stacks, widths, self.split, strict=True
        ):
            first, rows = side_by_side(stack)
            gram, slots = part.view(-1, width).tensor_split([width])
            for slot, row in zip(slots, split.tolist(), strict=True):
                if first <= row < first + len(rows):
                    slot.copy_(rows[row - first])
                    rows[row - first] = 0
            gram.copy_(rows.T @ rows)
        if self.group is not None:
            dist.all_reduce(message, group=self.group)
        grams, whole_rows = [], []
        for part, width in zip(message.split(sizes), widths, strict=True):
            gram, slots = part.view(-1, width).tensor_split([width])
            grams.append(gram + slots.T @ slots if len(slots) else gram)
            whole_rows.append(slots)
        return grams, whole_rows

    def buckets(self, groups: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Splits matrices into buckets, one for each all-gather. A group stays in one bucket.

        A bucket holds up to ``GATHER_BUCKET_BYTES``. So the number of buckets depends on the bytes
        of all matrices, not on the number of matrices.

        Args:
            groups: indices of matrices, such as A and B of a layer.
        """
        bucket: list[int] = []
        size = 0
        for group in groups:
            # Factors are gathered from fp32 master weights: 4 bytes per element.
            more = sum(4 * rows * cols for rows, cols in (self.shapes[i] for i in group))
            if bucket and size + more > GATHER_BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket, size = [*bucket, *group], size + more
        if bucket:
            yield bucket

    def gather(
        self, shards: Sequence[FlatShard] | Mapping[int, FlatShard], which: Sequence[int]
    ) -> list[Tensor]:
        """The full matrices ``which`` on every rank, on ``device``. One all-gather per call.

        Without a group: views of the shards on their own device, no communication.

        Args:
            shards: shards of this layout's matrices, by index.
            which: indices of the matrices to gather. They must have one dtype.
        """
        if self.group is None:
            return [shards[i].local.view(shards[i].shape) for i in which]
        ranges = self.ranges[:, list(which)]
        lengths = (ranges[..., 1] - ranges[..., 0]).tolist()  # per rank
        longest = max(sum(row) for row in lengths)
        mine = torch.cat([shards[i].local for i in which]).to(self.device)
        padded = torch.nn.functional.pad(mine, (0, longest - mine.numel()))
        everyone = _all_gather(padded, self.group).view(len(lengths), longest)
        parts = [flat[: sum(row)].split(row) for flat, row in zip(everyone, lengths, strict=True)]
        return [
            torch.cat([parts[p][j] for p in self.order[i]]).view(self.shapes[i])
            for j, i in enumerate(which)
        ]


def _all_gather(flat: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's ``flat`` (k,), concatenated in rank order: (world · k,). One all-gather."""
    everyone = flat.new_empty(dist.get_world_size(group) * flat.numel())
    dist.all_gather_into_tensor(everyone, flat, group=group)
    return everyone


def global_norm(shards: Sequence[FlatShard], device: torch.device) -> float:
    """The 2-norm of all matrices together, in float64. One all-reduce where they are sharded."""
    squares = [shard.local.double().square().sum() for shard in shards]
    square = torch.stack(squares).sum().to(device)
    if shards[0].group is not None:
        dist.all_reduce(square, group=shards[0].group)
    return float(square.sqrt())


def side_by_side(stack: Sequence[FlatShard]) -> tuple[int, Tensor]:
    """The touched rows of k shards of one range, concatenated by columns.

    Returns:
        (index of the first row, the rows (touched rows, k·cols) float64). Elements of other ranks
        are zero.
    """
    first = stack[0].offset // stack[0].shape[1]
    return first, torch.cat([shard.padded_rows()[1].double() for shard in stack], dim=1)


def mixed_rows(
    stack: Sequence[FlatShard], mix: Tensor, split: Tensor, split_rows: Tensor
) -> Tensor:
    """This rank's range of ``[M, …] mix``: 1-D float64, as long as ``local``. No communication.

    Args:
        stack: shards of one range, each of a matrix (rows, k).
        mix: matrix (shards·k, k) float64.
        split: indices of the rows that lie on several ranks, 1-D int64.
        split_rows: those rows of [M, …], complete, (split rows, shards·k) float64.
    """
    first, rows = side_by_side(stack)
    here = (split >= first) & (split < first + len(rows))
    rows[(split[here] - first).to(rows.device)] = split_rows[here.to(split_rows.device)].to(rows)
    shard = stack[0]
    start = shard.offset - first * shard.shape[1]
    return (rows @ mix.to(rows)).view(-1)[start : start + shard.local.numel()]


def split_rows(ranges: Tensor, cols: int) -> Tensor:
    """Indices of the rows that lie on more than one rank, ascending.

    Args:
        ranges: flat range [lo, hi) of one matrix on each rank, (world, 2) int64, disjoint.
        cols: number of columns of the matrix.
    """
    held = ranges[ranges[:, 1] > ranges[:, 0]]
    cuts = held.flatten().unique()
    return (cuts[cuts % cols != 0] // cols).unique()
