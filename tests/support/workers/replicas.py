"""Functions that ranks run in tests/checkpoint/test_replicas.py: they change bits of copies."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from scalora_dist.checkpoint.replicas import check_replicas, forward_copies
from scalora_dist.core.checksum import bits
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.distributed.world import World
from scalora_dist.errors import ReplicasDiffer
from scalora_dist.training.trainer import Trainer
from tests.support import runs
from tests.support.toy import Run
from tests.support.workers.checkpoint import checkpoints
from tests.support.workers.shards import counted

PLACE = 5  # the element that is changed
BIT = 3  # of that element: what a later merge adds does not round it away
FLIPPED = 1 << 40  # stands for one bit that flips: no pattern of 32 bits


def changed_by_training(run: Run) -> dict[str, FlatShard]:
    """{name: shard} of all that a checkpoint of the toy holds."""
    shards: dict[str, FlatShard] = {}
    for layer in run.engine.layer_shards(gradients=False):
        shards |= {f"{layer.name}.{key}": getattr(layer, key) for key in "WAB"}
        for key in "AB":
            for name, moment in zip("mv", getattr(layer, f"moments_{key}"), strict=True):
                shards[f"{layer.name}.{name}_{key}"] = moment
        if (low := run.merger.target.low_halves.get(f"{layer.name}.weight")) is not None:
            shards[f"{layer.name}.low"] = layer.W.like(low)
    return shards


def check(run: Run, folder: Path) -> tuple[str, int] | None:
    """The refusal and its status, None if the copies are the same."""
    try:
        made = checkpoints(run.world, folder)
        check_replicas(changed_by_training(run), run.engine, 2, made.newest_first)
    except ReplicasDiffer as error:
        return str(error), error.status
    return None


def change(
    world: World, folder: Path, name: str, patterns: Sequence[int | None], **case: Any
) -> list[tuple[str, int] | None]:
    """What the check says after two steps, and after one element of a copy is changed.

    Args:
        name: a name of ``changed_by_training`` or ``forward_copies``.
        patterns: for each rank, the integer that has the element's new bits; FLIPPED: one bit of
            it flips; None: no change.
    """
    run = Run(world, **case)
    for step in range(2):
        run.step(step)
    said = [check(run, folder)]
    copies = changed_by_training(run) | forward_copies(run.engine)
    pattern = patterns[world.rank]
    if pattern == FLIPPED:
        flip_bit(copies[name].local)
    elif pattern is not None:
        bits(copies[name].local)[PLACE] = pattern
    return [*said, check(run, folder)]


def flip_bit(local: Tensor) -> None:
    bits(local)[PLACE] ^= 1 << BIT


def collectives(world: World, folder: Path, **case: Any) -> Counter[str]:
    """The collectives of one check."""
    run = Run(world, **case)
    run.step(0)
    shards, made = changed_by_training(run), checkpoints(world, folder)
    with counted() as calls:
        check_replicas(shards, run.engine, 2, made.newest_first)
    return calls


class Struck(Trainer):
    """A run in which a bit of one rank's copy of W, or of its low half, flips after a step.

    Attributes:
        after: number of the step, from 1.
        rank: the rank whose bit flips.
        part: "weight" or "low".
        asked: whether the ranks are asked to stop in that step.
    """

    after, rank, part, asked = 3, 1, "weight", False

    def take_step(self, step: int, *args: Any) -> Any:
        if self.asked and step + 1 == self.after:
            os.kill(os.getpid(), signal.SIGTERM)
        result = super().take_step(step, *args)
        if step + 1 == self.after and self.world.rank == self.rank:
            layer = self.engine.layer_shards(gradients=False)[0]
            low = self.runner.low_halves.get(f"{layer.name}.weight")
            local = {"weight": layer.W.local, "low": low}[self.part]
            assert local is not None
            flip_bit(local)
        return result


def refused(world: World, case: dict[str, Any], **strike: Any) -> tuple[str, int]:
    """Train until the copies are found to differ. Returns the sentence and its status."""
    trainer = type("Struck", (Struck,), strike)
    try:
        runs.make(world, case, trainer).run()
    except ReplicasDiffer as error:
        return str(error), error.status
    raise AssertionError("nothing was refused")
