"""Functions that ranks run in tests/profiling and tests/training/test_step_profile.py."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from scalora_dist.distributed.world import World
from scalora_dist.profiling.communication import communication
from tests.support import runs

LATE = 0.5  # seconds


def two_waits(world: World) -> list[tuple[float, float]]:
    """The results of ``communication`` for two all-reduces to which the last rank is late.

    Ranks wait for the first one. During the second, the other ranks compute until it is complete.
    """
    found, numbers, matrix = [], torch.ones(1000), torch.eye(300)
    for beside in (False, True):
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            start = time.time_ns()
            if world.rank == world.size - 1:
                time.sleep(LATE)
            work = dist.all_reduce(numbers, async_op=True)
            while beside and not work.is_completed():
                matrix = matrix @ matrix
            work.wait()
            end = time.time_ns()
        assert profiler.profiler and profiler.profiler.kineto_results
        events = profiler.profiler.kineto_results.events()
        found.append(communication(events, start, end, world.device))
    return found


def late_backward(world: World, case: dict[str, Any], late_step: int) -> None:
    """Train. The last rank sleeps before the last backward of one step."""
    trainer = runs.make(world, case)
    backward, count = trainer.engine.backward, 0

    def late(loss: Tensor, *, last: bool) -> None:
        nonlocal count
        count += last
        if last and count == late_step and world.rank == world.size - 1:
            time.sleep(LATE)
        backward(loss, last=last)

    trainer.engine.backward = late  # type: ignore[method-assign]
    trainer.run()
