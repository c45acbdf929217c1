"""What a start is given: the sharded model, and a pass over a few samples where it needs one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from scalora_dist.config import MethodArguments
from scalora_dist.engines.base import Engine
from scalora_dist.shards import FlatShard


@dataclass(frozen=True)
class Start:
    """
    Attributes:
        losses: one pass over this rank's share of the samples, as ``weight_gradients`` takes it.
        learning_rate: of the run, before its schedule.
    """

    engine: Engine
    args: MethodArguments
    losses: Callable[[], Iterable[Tensor]]
    learning_rate: float
    seed: int

    def weights(self) -> dict[str, FlatShard]:
        """{layer: this rank's range of its W}, in model order."""
        shards = {p.name: p.shard for p in self.engine.base()}
        return {name: shards[f"{name}.weight"] for name in self.engine.adapted}

    def added(self) -> dict[str, FlatShard]:
        """{parameter: this rank's range of it} of what the method added."""
        return {p.name: p.shard for p in self.engine.added()}
