"""Measures a run on ranks that already run, and plans it, for tests/planning/test_plan.py."""

from __future__ import annotations

import gc
from collections import deque
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from scalora_dist.config.parser import parse_options
from scalora_dist.distributed.world import World
from scalora_dist.modeling import loss, offloaded_activations
from scalora_dist.modeling.offloaded_activations import AHEAD, HostCopies
from scalora_dist.planning.arguments import PlanArguments
from scalora_dist.planning.measured import STEPS, MeasuredTrainer
from scalora_dist.planning.plan import Plan
from scalora_dist.planning.planner import Planner
from tests.support import runs

SMALLEST = 2**12  # bytes; of a tiny model's activations, those are offloaded that weigh something


_ahead: deque[Tensor] = deque()


class Found(NamedTuple):
    """What one rank needed in a step.

    Attributes:
        tracked: peak bytes of live tensors.
        phases: {phase of a plan: the same}, of the phases of a rescale.
        scale: the same while the factors are scaled.
        staged: bytes of the copies that a save makes.
        gathered: bytes that all-gathers filled.
        reduced: bytes that other collectives filled.
        peak: peak memory of the process; on a GPU what the allocator took for this run. None:
            unknown.
    """

    tracked: int
    phases: dict[str, int]
    scale: int
    staged: int
    gathered: int
    reduced: int
    peak: int | None


def measured(world: World, options: dict[str, Any]) -> Found:
    gc.collect()
    # What earlier tests left on the GPU, where this process has run others.
    others = torch.cuda.memory_allocated(world.device) if world.device.type == "cuda" else 0
    # A plan knows the loss in chunks. It counts the device's memory, which here is the host's.
    with (
        patch.object(loss, "FOR_LIGER", ""),
        patch.object(offloaded_activations, "SMALLEST", SMALLEST),
        patch.multiple(HostCopies, send=_sent, fetch=_fetched),
    ):
        trainer = runs.make(world, options | {"max_steps": STEPS, "eval_size": 0}, MeasuredTrainer)
        assert isinstance(trainer, MeasuredTrainer)
        trainer.run()
    _ahead.clear()
    traffic = trainer.traffic
    reduced = traffic.received - traffic.gathered
    peak = None if trainer.peak is None else trainer.peak - others
    return Found(
        trainer.tracked,
        trainer.phases,
        trainer.scale,
        trainer.staged,
        traffic.gathered,
        reduced,
        peak,
    )


def _sent(_: HostCopies, tensor: Tensor) -> Any:
    """A copy that is no tensor, so that it is not counted."""
    _ahead.clear()  # a forward begins, and the backward before it has ended
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    data = flat.view(torch.uint8).numpy().copy()
    return data, tensor.dtype, tensor.shape, tensor.stride()


def _fetched(_: HostCopies, copy: Any) -> Tensor:
    """The tensor. As on a GPU, the last ones are live while the host is ahead of their use."""
    data, dtype, shape, stride = copy
    if len(_ahead) > AHEAD:
        _ahead.popleft()
    flat = torch.empty(len(data), dtype=torch.uint8)
    flat.numpy()[:] = data
    tensor = flat.view(dtype).as_strided(shape, stride)
    _ahead.append(tensor)
    return tensor


def planned(options: dict[str, Any], size: int) -> Plan:
    parsed = parse_options(runs.words(options))
    with patch.object(offloaded_activations, "SMALLEST", SMALLEST):
        return Planner(parsed, PlanArguments()).plan(parsed, size)
