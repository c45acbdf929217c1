"""Runs a training and counts how often the method's initialization ran."""

from __future__ import annotations

import dataclasses
from typing import Any

from scalora_dist.distributed.world import World
from scalora_dist.methods.init.initialization import Initialization
from scalora_dist.training.trainer import Trainer
from tests.support import runs


def train(world: World, case: dict[str, Any]) -> tuple[int, int]:
    """Train. Returns (first step of this run, number of initializations)."""
    starts = 0

    class Counting(Trainer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            method = self.runner.method
            if (start := method.initialize) is not None:

                def count(given: Initialization) -> None:
                    nonlocal starts
                    starts += 1
                    start(given)

                self.runner.method = dataclasses.replace(method, initialize=count)

    trainer = runs.make(world, case, Counting)
    trainer.run()
    return trainer.progress.first_step, starts
