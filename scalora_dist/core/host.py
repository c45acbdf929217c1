"""The ways between a device's memory and the host's. All of ours go through these two functions.

The weights of CPU offload do not: ``host_pieces.py`` merges into them. Neither do the parts of sums
that are in the host's memory: ``host_sums.py`` adds them.

A host synchronisation stops the host until the device has done all its work. So there are few, and
tests count them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def on_host(work: Callable[..., T], *tensors: Tensor) -> T:
    """The result of ``work`` on copies of ``tensors`` in the host's memory, or on those there.

    One host synchronisation for all of them; none where they are on the CPU.

    Args:
        work: a function of the copies, in the order of ``tensors``. It may only use these.
    """
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return work(*copies)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; the tensor itself, where it is there.

    The host does not wait, but for a copy to the CPU. A copy from pageable memory would make it
    wait, so the copy comes from pinned memory.
    """
    if tensor.device.type == device.type:
        return tensor
    if device.type == "cpu":
        return on_host(lambda copy: copy, tensor)
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
