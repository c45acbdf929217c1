"""Adapts FlatShards to torch.distributed.checkpoint, which reshards them when it loads.

Every tensor is saved flat, in 1-D. Then two shardings differ only in where the 1-D ranges begin and
end. So ZeRO's fragments, FSDP2's rows and full tensors can be loaded from each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.distributed.world import World


@dataclass(frozen=True)
class FlatPart:
    """Elements ``[offset, offset + local.numel())`` of a flat tensor with ``numel`` elements.

    The two dunder methods implement torch's ``_Checkpointable`` protocol.

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

    def size(self) -> torch.Size:
        return torch.Size([self.numel])

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if not self.local.numel():
            return []
        return [ChunkStorageMetadata(torch.Size([self.offset]), torch.Size([self.local.numel()]))]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.local.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]


def holders(shard: FlatShard, world: World) -> int:
    """The number of ranks that hold the same range of a matrix, this rank included."""
    return world.size // (dist.get_world_size(shard.group) if shard.group else 1)


class SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


class LoadPlanner(DefaultLoadPlanner):
    """Plans to load what both the checkpoint and this run have.

    Attributes:
        missing: names of this run's tensors that the checkpoint does not hold.
        unread: names of the checkpoint's tensors that this run does not load.
    """

    def __init__(self) -> None:
        super().__init__(
            flatten_state_dict=False, flatten_sharded_tensors=False, allow_partial_load=True
        )
        self.missing: list[str] = []
        self.unread: list[str] = []

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        # torch's default replaces everything that is not a tensor by None.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator
        held = metadata.state_dict_metadata if metadata else {}
        self.missing = [name for name in state_dict if name not in held]
        self.unread = [name for name in held if name not in state_dict]

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


class Stager(AsyncStager):
    """Copies this rank's parts to the CPU. Training may continue once the copies are done."""

    def stage(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        staged = {name: replace(part, local=_copy(part.local)) for name, part in state_dict.items()}
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return staged

    def synchronize_staging(self) -> None:
        """``stage`` has already waited."""

    def close(self) -> None:
        """There is nothing to free."""


def _copy(local: Tensor) -> Tensor:
    # A copy from a GPU is several times faster into pinned memory. torch reuses that memory.
    copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
    return copy.copy_(local.detach(), non_blocking=local.is_cuda)
