"""Runs of a version that chose other layers."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from scalora_dist.distributed.world import World
from scalora_dist.layers import target_modules
from scalora_dist.methods import rank_monitor
from tests.support import tiny_runs


def train(world: World, case: dict[str, Any]) -> tuple[int, dict[str, Any], list[str]]:
    """Train with bypassed layers, and a monitor that follows the first layers."""
    first = patch.object(rank_monitor, "spread_out", lambda names, count: names[:count])
    every = patch.object(target_modules, "find_bypassed", lambda *given: set[str]())
    with first, every:
        return tiny_runs.train(world, case)
