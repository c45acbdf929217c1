"""The parts of tensors that a rank saves and loads: flat ranges.

Every tensor is saved flat, in 1-D. Then two shardings differ only in where the 1-D ranges begin and
end. So ZeRO's fragments, FSDP2's rows and full tensors can be loaded from each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.distributed.world import World


@dataclass(frozen=True)
class FlatPart:
    """Elements ``[offset, offset + local.numel())`` of a flat tensor with ``numel`` elements.

    Attributes:
        local: this rank's elements, 1-D, any dtype.
        offset: index of ``local[0]`` in the flat tensor.
        numel: number of elements of the full tensor.
    """

    local: Tensor
    offset: int
    numel: int

    @classmethod
    def of(cls, shard: FlatShard) -> FlatPart:
        """All elements that this rank holds: the part that it loads."""
        return cls(shard.local, shard.offset, shard.shape[0] * shard.shape[1])

    @classmethod
    def share_of(cls, shard: FlatShard, world: World) -> FlatPart:
        """The part that this rank saves. If several ranks hold a range, each saves a slice."""
        copies = holders(shard, world)
        size = shard.local.numel()
        # The ranks of one group are consecutive, so the n-th group holds the n-th copy.
        copy = world.rank // (world.size // copies)
        first, end = size * copy // copies, size * (copy + 1) // copies
        whole = cls.of(shard)
        return replace(whole, local=shard.local[first:end], offset=shard.offset + first)


def holders(shard: FlatShard, world: World) -> int:
    """The number of ranks that hold the same range of a matrix, this rank included."""
    return world.size // (dist.get_world_size(shard.group) if shard.group else 1)


def stage(parts: Mapping[str, FlatPart]) -> dict[str, FlatPart]:
    """Copies of this rank's parts on the CPU, complete when it returns."""
    staged = {name: replace(part, local=_copy(part.local)) for name, part in parts.items()}
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return staged


def _copy(local: Tensor) -> Tensor:
    # A copy from a GPU is several times faster into pinned memory. torch reuses that memory.
    copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
    return copy.copy_(local.detach(), non_blocking=local.is_cuda)
