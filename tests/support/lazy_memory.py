"""A stand-in for CUDA's streams and memory, which is used again as early as CUDA's allocator may.

Memory belongs to the stream on which it was allocated. What was freed may be allocated again at
once, for work on that stream. Only if another stream was recorded as a user, this is put off until
that stream is past what it had in its queue then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.lazy_streams import Event, LazyCuda, Stream


@dataclass(eq=False)
class Block:
    """Memory on the device.

    Attributes:
        owner: the stream on which it was allocated.
        users: streams that were recorded as users.
        until: events after which it may be allocated again, once it was freed.
    """

    memory: np.ndarray[Any, Any]
    owner: Stream
    users: list[Stream] = field(default_factory=list)
    until: list[Event] = field(default_factory=list)


class LazyMemory(LazyCuda):
    """LazyCuda with memory. In its context ``torch.empty_strided`` allocates on the device.

    It has all ones in every byte (NaN) where it is allocated, and again as soon as it may be.
    Pinned memory is the host's.

    Attributes:
        blocks: {address: memory of the device that a tensor has}.
        freed: memory of the device that no tensor has, and that may not be allocated again yet.
        most: the largest number of these and of those at any time.
    """

    NAMES = ("main", "copies")

    def __init__(self, seed: int, prefer: str, *, eager: bool) -> None:
        super().__init__(seed, prefer, eager=eager)
        self.blocks: dict[int, Block] = {}
        self.freed: list[Block] = []
        self.most = 0

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        """What ``Tensor.record_stream`` is in the test."""
        self.blocks[tensor.untyped_storage().data_ptr()].users.append(stream)

    def launch(self, name: str, work: Callable[..., Any], *tensors: Tensor) -> None:
        """Queue ``work(*tensors)``. The queue keeps no memory of the device, as CUDA's does not."""
        super().launch(name, torch.no_grad()(work), *map(self._address, tensors))

    def _address(self, tensor: Tensor) -> Tensor:
        """A tensor in the same place, which does not keep the storage of this one."""
        block = self.blocks.get(tensor.untyped_storage().data_ptr())
        if block is None:
            return tensor
        place = torch.from_numpy(block.memory).view(tensor.dtype)
        return place.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _allocate(self, like: Tensor) -> Tensor:
        past = [block for block in self.freed if all(event.done[0] for event in block.until)]
        self.freed = [block for block in self.freed if block not in past]
        for block in past:
            self._reuse(block)
        block = Block(np.full(like.untyped_storage().nbytes(), 0xFF, np.uint8), self.now)
        flat = torch.from_numpy(block.memory)
        storage = flat.untyped_storage()
        self.blocks[storage.data_ptr()] = block
        weakref.finalize(storage, self._free, storage.data_ptr())
        self.most = max(self.most, len(self.blocks) + len(self.freed))
        return flat.view(like.dtype).as_strided(like.shape, like.stride())

    def _free(self, address: int) -> None:
        block = self.blocks.pop(address)
        block.until = [user.record_event() for user in block.users]
        if block.until:
            self.freed.append(block)
        else:
            self._reuse(block)

    def _reuse(self, block: Block) -> None:
        block.owner.put("reuse", lambda: block.memory.fill(0xFF))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.ops.aten.empty_strided.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        pinned = kwargs.pop("pin_memory", False)
        made = func(*args, **kwargs)
        return made if pinned else self._allocate(made)
