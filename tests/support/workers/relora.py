"""Functions that ranks run in tests/methods/test_relora.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from scalora_dist.distributed.world import World
from scalora_dist.methods.relora import ReloraRestart
from scalora_dist.profiling.clock import Clock
from tests.support import toy
from tests.support.reference import State

INTERVAL, RESTARTS, SEED = 2, 2, 5


@dataclass(frozen=True)
class Restart:
    """The toy around one restart.

    Attributes:
        before: (states, outputs) before the restart.
        after: (states, outputs) after it.
        high: {layer: W after it, without low halves}.
    """

    before: tuple[dict[str, State], dict[str, np.ndarray]]
    after: tuple[dict[str, State], dict[str, np.ndarray]]
    high: dict[str, np.ndarray]


def restarts(world: World, *, prune: float, **case: Any) -> list[Restart]:
    """Plain AdamW steps on the toy, with a restart after every second step."""
    run = toy.Run(world, **case)
    restart = ReloraRestart(run.merger, interval=INTERVAL, prune=prune, seed=SEED)
    seen = []
    assert not restart.due(0)
    for taken in range(1, RESTARTS * INTERVAL + 1):
        run.backward(taken - 1)
        run.engine.step()
        if restart.due(taken):
            before = run.look()
            restart(run.engine, taken, Clock())
            layers = run.engine.layer_shards(gradients=False)
            high = {layer.name: toy.whole(layer.W, world.device) for layer in layers}
            seen.append(Restart(before, run.look(), high))
    return seen
