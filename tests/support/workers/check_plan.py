"""Measures a run on ranks that already run, and plans it, for tests/planning/test_plan.py."""

from __future__ import annotations

import gc
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from scalora_dist.config.parser import parse_options
from scalora_dist.distributed.world import World
from scalora_dist.modeling import loss
from scalora_dist.planning.arguments import PlanArguments
from scalora_dist.planning.measured import STEPS, MeasuredTrainer
from scalora_dist.planning.plan import Plan
from scalora_dist.planning.planner import Planner
from tests.support import runs


class Found(NamedTuple):
    """What one rank needed in a step.

    Attributes:
        tracked: peak bytes of live tensors.
        gathered: bytes that all-gathers filled.
        reduced: bytes that other collectives filled.
        peak: peak memory of the process; on a GPU what the allocator took for this run. None:
            unknown.
    """

    tracked: int
    gathered: int
    reduced: int
    peak: int | None


def measured(world: World, options: dict[str, Any]) -> Found:
    gc.collect()
    # What earlier tests left on the GPU, where this process has run others.
    others = torch.cuda.memory_allocated(world.device) if world.device.type == "cuda" else 0
    with patch.object(loss, "FOR_LIGER", ""):  # a plan knows the loss in chunks
        trainer = runs.make(world, options | {"max_steps": STEPS, "eval_size": 0}, MeasuredTrainer)
        assert isinstance(trainer, MeasuredTrainer)
        trainer.run()
    traffic = trainer.traffic
    reduced = traffic.received - traffic.gathered
    peak = None if trainer.peak is None else trainer.peak - others
    return Found(trainer.tracked, traffic.gathered, reduced, peak)


def planned(options: dict[str, Any], size: int) -> Plan:
    parsed = parse_options(runs.words(options))
    return Planner(parsed, PlanArguments()).plan(parsed, size)
