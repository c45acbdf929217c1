"""Measures the memory that a rank has for the gradients of an initialization."""

from __future__ import annotations

from collections.abc import Callable

import torch

from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.distributed.host_memory import available_bytes
from scalora_dist.distributed.world import World
from scalora_dist.methods.init.groups import Budget
from scalora_dist.profiling.memory import restart_peak

HOST_SHARE = 0.5  # of what is available; the rest is for the samples, copies and other processes
DEVICE_SHARE = 0.9  # of what is free; the rest is lost between blocks of the allocator


def free_room(rehearse: Callable[[], None], world: World) -> Budget:
    """The memory that every rank has for sums. A collective.

    On a GPU it is what is free, less the peak of a rehearsal. The host's memory is shared out among
    the ranks of its node.

    Args:
        rehearse: does what a pass does for one micro-batch, and keeps no sum. Called on GPUs only.
    """
    node = ceil_div(world.size, world.nodes)  # ranks on it
    device, host = 0, int(HOST_SHARE * available_bytes()) // node
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        restart_peak(world.device)
        before = torch.cuda.memory_allocated(world.device)
        rehearse()
        peak = (restart_peak(world.device) or 0) - before
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(world.device)
        device = device_room(free, peak)
    # No rank allocates before all have measured.
    least = world.max(-device, -host)
    return Budget(*(-int(number) for number in least))


def device_room(free: int, peak: int) -> int:
    """Bytes of a GPU for sums.

    Args:
        free: bytes that are free between two passes.
        peak: bytes that a pass takes beside its sums: activations, and the gradient of one layer.
    """
    return max(0, int(DEVICE_SHARE * free) - peak)
