"""Layout: where the ranges of a list of sharded matrices lie, and gathers of full matrices.

A rescale works on hundreds of small shards. One kernel for each would cost more time than the work
itself. So matrices that are cut alike are handled together: a ``Group`` is a list of matrices with
ranges of one length on this rank, and one copy, product or message serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from scalora_dist.core import host
from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.core.flat_shard import FlatShard

# Limit in bytes of one gather of factors. A single group of matrices may exceed it.
GATHER_BUCKET_BYTES = 128 * 2**20
# Limit in elements of what is worked on at once on this rank. A single matrix may exceed it.
BATCH_ELEMENTS = 2**23

Shards: TypeAlias = Sequence[FlatShard] | Mapping[int, FlatShard]


@dataclass(frozen=True)
class Group:
    """Matrices whose ranges on this rank have one length and begin at one column.

    Attributes:
        which: indices of the matrices.
        index: the same, int64 on the layout's device.
        head: elements of the first touched row that lie before the range.
        length: elements of each range.
        cols: columns of each matrix.
        start: position of the first matrix's elements in the batch.
    """

    which: list[int]
    index: Tensor
    head: int
    length: int
    cols: int
    start: int

    @property
    def rows(self) -> int:
        """Touched rows of each matrix."""
        return ceil_div(self.head + self.length, self.cols)

    @property
    def tail(self) -> int:
        """Elements of the last touched row that lie after the range."""
        return self.rows * self.cols - self.head - self.length

    @property
    def flat(self) -> slice:
        """Where the matrices' elements are in the batch."""
        return slice(self.start, self.start + len(self.which) * self.length)


Batch: TypeAlias = list[Group]


@dataclass(frozen=True)
class Layout:
    """The ranges of a list of matrices on all ranks. Exchanged once, because they never change.

    Attributes:
        shapes: (rows, cols) of each full matrix.
        ranges: flat range ``[lo, hi)`` of matrix i on rank p, (world, matrices, 2) int64.
        group: process group over which all matrices are sharded; None: every rank holds them all.
        device: device of the work and of communication buffers (the accelerator with NCCL, the CPU
            with gloo). Shards may lie elsewhere (offload).
        rank: this rank in ``group``.
    """

    shapes: list[tuple[int, int]]
    ranges: np.ndarray
    group: dist.ProcessGroup | None
    device: torch.device
    rank: int

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
        mine = np.array([(shard.offset, shard.offset + shard.local.numel()) for shard in shards])
        everyone, rank = mine[None], 0
        if group is not None:
            rank = dist.get_rank(group)
            message = host.to_device(torch.from_numpy(mine.ravel()), device)
            everyone = host.on_host(Tensor.numpy, _all_gather(message, group))
        everyone = everyone.reshape(-1, *mine.shape)
        return cls([shard.shape for shard in shards], everyone, group, device, rank)

    def only(self, which: Sequence[int]) -> Layout:
        """The layout of the matrices with the indices ``which``. No communication."""
        shapes = [self.shapes[i] for i in which]
        return replace(self, shapes=shapes, ranges=self.ranges[:, list(which)])

    @cached_property
    def split(self) -> list[Tensor]:
        """For each matrix, the indices of the rows that lie on more than one rank, 1-D int64."""
        return [split_rows(self.ranges[:, i], cols) for i, (_, cols) in enumerate(self.shapes)]

    # --- what this rank holds --------------------------------------------------------------------

    @cached_property
    def batches(self) -> list[Batch]:
        """This rank's ranges in groups, up to ``BATCH_ELEMENTS`` of them together."""
        alike: dict[tuple[int, int, int], list[int]] = {}
        for i, (low, high) in enumerate(self.ranges[self.rank].tolist()):
            if high > low:
                cols = self.shapes[i][1]
                alike.setdefault((cols, low % cols, high - low), []).append(i)
        batches: list[Batch] = []
        room = 0
        for (cols, head, length), which in alike.items():
            while which:
                if room < length:
                    batches.append([])
                    room = BATCH_ELEMENTS
                count = max(1, min(len(which), room // length))
                here, which = which[:count], which[count:]
                index = host.to_device(torch.tensor(here), self.device)
                start = batches[-1][-1].flat.stop if batches[-1] else 0
                batches[-1].append(Group(here, index, head, length, cols, start))
                room -= count * length
        return batches

    def pack(self, batch: Batch, shards: Shards, out: Tensor | None = None) -> Tensor:
        """This rank's elements of a batch's matrices in one buffer on ``device``: a copy.

        Args:
            out: 1-D buffer on ``device`` to fill. None: a new one, of the shards' dtype.
        """
        locals_ = _locals(batch, shards)
        if out is None:
            return self._joined(locals_)
        if (locals_[0].device, locals_[0].dtype) == (out.device, out.dtype):
            return torch.cat(locals_, out=out)
        return out.copy_(self._joined(locals_))

    def unpack(self, batch: Batch, *pairs: tuple[Tensor, Shards]) -> None:
        """The inverse of ``pack``: write each packed buffer into its shards, in their dtype.

        The host waits once for all shards that are offloaded.
        """
        lengths = _lengths(batch)
        away: list[tuple[Tensor, list[Tensor]]] = []
        for packed, shards in pairs:
            locals_ = _locals(batch, shards)
            packed = packed.to(locals_[0].dtype)
            if packed.device == locals_[0].device:
                torch._foreach_copy_(locals_, packed.split(lengths))
            else:
                away.append((packed, locals_))

        def write(*copies: Tensor) -> None:
            for copy, (_, locals_) in zip(copies, away, strict=True):
                torch._foreach_copy_(locals_, copy.split(lengths))

        if away:
            host.on_host(write, *(packed for packed, _ in away))

    def column_values(self, batch: Batch, tables: Tensor) -> Tensor:
        """For each element of a batch, its column's entry of the tables: (tables, elements).

        Args:
            tables: (tables, matrices, cols) on ``device``.
        """
        parts = []
        for group in batch:
            values = tables[:, group.index, None].expand(-1, -1, group.rows, -1).flatten(2)
            parts.append(values[:, :, group.head : group.head + group.length].flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def scale_columns_(self, tables: Tensor, fields: Sequence[Sequence[Shards]]) -> None:
        """Multiply column k of matrix i by ``tables[t, i, k]``, in each list of ``fields[t]``.

        A 16-bit shard is scaled in fp32 and rounded once. No communication.

        Args:
            tables: (tables, matrices, cols) on ``device``, of the shards' dtype or fp32.
            fields: for each table, lists of shards of this layout's matrices: factors, moments …
        """
        for batch in self.batches:
            lengths = _lengths(batch)
            scaled: list[tuple[Tensor, Shards]] = []  # of shards that no kernel can scale in place
            for row, lists in zip(self.column_values(batch, tables), fields, strict=True):
                for shards in lists:
                    locals_ = _locals(batch, shards)
                    if (locals_[0].dtype, locals_[0].device) == (row.dtype, row.device):
                        torch._foreach_mul_(locals_, row.split(lengths))
                    else:
                        scaled.append((self.pack(batch, shards) * row, shards))
            self.unpack(batch, *scaled)

    # --- full matrices ---------------------------------------------------------------------------

    @cached_property
    def shares(self) -> list[int]:
        """For each matrix, the s of its cut into ranges of s elements in rank order; 0: another.

        ZeRO-3 and FSDP2 cut in this way. The last ranks may have less. If so many have less that an
        all-gather of s elements from each rank would be mostly padding, it is 0 too.
        """
        numels = np.array([rows * cols for rows, cols in self.shapes])
        share = self.ranges[0, :, 1] - self.ranges[0, :, 0]
        cuts = np.minimum(np.arange(len(self.ranges) + 1)[:, None] * share, numels)
        even = (self.ranges == np.stack([cuts[:-1], cuts[1:]], axis=2)).all(axis=(0, 2))
        return (even * share * (len(self.ranges) * share < 2 * numels)).tolist()

    def buckets(self, groups: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Splits matrices into buckets, one for each gather. A group stays in one bucket.

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

    def gather(self, shards: Shards, which: Sequence[int]) -> list[Tensor]:
        """The full matrices ``which`` on every rank, on ``device``.

        One all-gather, one all-reduce or both, as for ``gather_stacks``.

        Without a group: views of the shards on their own device, no communication.

        Args:
            shards: shards of this layout's matrices, by index.
            which: indices of the matrices to gather. They must have one dtype.
        """
        if self.group is None:
            return [shards[i].local.view(shards[i].shape) for i in which]
        found: dict[int, Tensor] = {}
        for indices, whole in self.gather_stacks(shards, which):
            found |= dict(zip(indices, whole.unbind(), strict=True))
        return [found[i] for i in which]

    def gather_stacks(self, shards: Shards, which: Sequence[int]) -> list[tuple[list[int], Tensor]]:
        """As ``gather``, with all matrices of one shape in one tensor, which is a copy.

        Matrices with ``shares`` come by one all-gather. Others (ZeRO-1 and 2, which cut a buffer of
        all matrices) come by one all-reduce, to which every rank adds its part. An all-gather would
        pad every rank's part to the longest, and one bucket lies on a few ranks.

        Returns:
            for each shape (and share): indices of the matrices in the order of ``which``, and the
            matrices (matrices, rows, cols), each of them contiguous.
        """
        alike: dict[tuple[tuple[int, int], int], list[int]] = {}
        for i in which:
            alike.setdefault((self.shapes[i], self.shares[i]), []).append(i)
        if self.group is None:
            return [
                (indices, self._packed(shards, indices).view(-1, *shape))
                for (shape, _), indices in alike.items()
            ]
        even = [indices for (_, share), indices in alike.items() if share]
        odd = [indices for (_, share), indices in alike.items() if not share]
        return [
            *(self._gathered(shards, even) if even else []),
            *(self._summed(shards, odd) if odd else []),
        ]

    def _packed(self, shards: Shards, which: Sequence[int]) -> Tensor:
        """This rank's elements of the matrices ``which``, one after another, on ``device``."""
        return self._joined([shards[i].local for i in which])

    def _joined(self, locals_: Sequence[Tensor]) -> Tensor:
        if locals_[0].device.type == self.device.type:
            return torch.cat(list(locals_))
        # Offloaded: joined in pinned memory, so that the copy to the device does not wait.
        size = sum(local.numel() for local in locals_)
        staging = locals_[0].new_empty(size, pin_memory=self.device.type == "cuda")
        return host.to_device(torch.cat(list(locals_), out=staging), self.device)

    def _gathered(
        self, shards: Shards, lists: Sequence[list[int]]
    ) -> list[tuple[list[int], Tensor]]:
        """Matrices with ``shares``, by one all-gather. On last ranks, shares are padded.

        Args:
            lists: indices of the matrices, by shape.
        """
        parts = []
        for indices in lists:
            part = self._packed(shards, indices).view(len(indices), -1)
            missing = self.shares[indices[0]] - part.shape[1]
            parts.append((F.pad(part, (0, missing)) if missing else part).flatten())
        sizes = [part.numel() for part in parts]
        mine = torch.cat(parts)
        del parts
        everyone = _all_gather(mine, self.group).view(-1, mine.numel())
        del mine
        stacks = []
        for indices, shares in zip(lists, everyone.split(sizes, dim=1), strict=True):
            rows, cols = self.shapes[indices[0]]
            by_matrix = shares.unflatten(1, (len(indices), -1)).transpose(0, 1)
            whole = by_matrix.flatten(1).contiguous()[:, : rows * cols]
            stacks.append((indices, whole.unflatten(1, (rows, cols))))
        return stacks

    def _summed(self, shards: Shards, lists: Sequence[list[int]]) -> list[tuple[list[int], Tensor]]:
        """Matrices that are cut in any way, by one all-reduce: each element is on one rank.

        Args:
            lists: indices of the matrices, by shape.
        """
        order = [i for indices in lists for i in indices]
        sizes = [rows * cols for rows, cols in (self.shapes[i] for i in order)]
        mine = self._packed(shards, order)
        message = torch.zeros(sum(sizes), dtype=mine.dtype, device=self.device)
        spans = self.ranges[self.rank, order].tolist()
        held = [
            (whole[low:high], high - low)
            for whole, (low, high) in zip(message.split(sizes), spans, strict=True)
            if high > low
        ]
        if held:
            targets, lengths = zip(*held, strict=True)
            torch._foreach_copy_(targets, mine.split(lengths))
        dist.all_reduce(message, group=self.group)
        by_shape = message.split([len(i) * math.prod(self.shapes[i[0]]) for i in lists])
        return [
            (indices, whole.view(-1, *self.shapes[indices[0]]))
            for indices, whole in zip(lists, by_shape, strict=True)
        ]


def _locals(batch: Batch, shards: Shards) -> list[Tensor]:
    """This rank's ranges of a batch's matrices, in the order of ``Layout.pack``."""
    return [shards[i].local for group in batch for i in group.which]


def _lengths(batch: Batch) -> list[int]:
    """The lengths of the same ranges."""
    return [group.length for group in batch for _ in group.which]


def full_tensor(shard: FlatShard, device: torch.device | str = "cpu") -> Tensor:
    """The full matrix (rows, cols) on every rank, on ``device``. Two collectives.

    Without a group: a view of the shard on its own device, no communication.
    """
    return Layout.of([shard], device).gather([shard], range(1))[0]


def _all_gather(flat: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's ``flat`` (k,), concatenated in rank order: (world · k,). One all-gather."""
    everyone = flat.new_empty(dist.get_world_size(group) * flat.numel())
    dist.all_gather_into_tensor(everyone, flat, group=group)
    return everyone


def global_norm(shards: Sequence[FlatShard], device: torch.device) -> Tensor:
    """The 2-norm of all matrices together, a float64 scalar on ``device``.

    One all-reduce where they are sharded.
    """
    held = [shard.local for shard in shards if shard.local.numel()]
    square = torch.zeros((), dtype=torch.float64, device=device)
    if held:
        norms = torch.stack(torch._foreach_norm(held, 2, torch.float64))
        square = host.to_device(norms, device).square().sum()
    if shards[0].group is not None:
        dist.all_reduce(square, group=shards[0].group)
    return square.sqrt()


def split_rows(ranges: np.ndarray, cols: int) -> Tensor:
    """Indices of the rows that lie on more than one rank, ascending, 1-D int64.

    Args:
        ranges: flat range [lo, hi) of one matrix on each rank, (world, 2) int64, disjoint.
        cols: number of columns of the matrix.
    """
    cuts = ranges[ranges[:, 1] > ranges[:, 0]].ravel()
    return torch.from_numpy(np.unique(cuts[cuts % cols != 0] // cols))
