"""A measured run on ranks that are there, and its plan."""

from __future__ import annotations

from typing import Any, NamedTuple

from scalora_dist.config.parser import parse_options
from scalora_dist.distributed.world import World
from scalora_dist.planning.arguments import PlanArguments
from scalora_dist.planning.measured import STEPS, MeasuredTrainer
from scalora_dist.planning.plan import Plan
from scalora_dist.planning.planner import Planner
from tests.support import runs


class Found(NamedTuple):
    tracked: int
    gathered: int


def measured(world: World, options: dict[str, Any]) -> Found:
    """Bytes of tensors at the worst moment of a step, and of all-gathers' results, on this rank."""
    trainer = runs.make(world, options | {"max_steps": STEPS, "eval_size": 0}, MeasuredTrainer)
    trainer.run()
    return Found(trainer.tracked, trainer.traffic.gathered)


def planned(options: dict[str, Any], size: int) -> Plan:
    parsed = parse_options(runs.words(options))
    return Planner(parsed, PlanArguments()).plan(parsed, size)
