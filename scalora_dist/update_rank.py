"""How high the rank of the accumulated update, the merged weight less W_0, has grown."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scalora_dist.engines.base import Engine
from scalora_dist.merged import MergedWeights

# A singular value counts from this share of the largest on.
RELATIVE_THRESHOLD = 1e-3


def spread_out(names: list[str], count: int) -> list[str]:
    """``count`` of them (or all), spread evenly over the model."""
    count = min(count, len(names))
    return [names[i * len(names) // count] for i in range(count)]


class UpdateRank:
    """Remembers this rank's shards of a few layers' initial weights, spread over the model."""

    def __init__(self, engine: Engine, count: int) -> None:
        self.engine = engine
        weights = {p.name: p.shard for p in engine.base()}
        self.initial = {
            f"{name}.weight": weights[f"{name}.weight"].local.clone()
            for name in spread_out(list(engine.adapted), count)
        }

    @torch.no_grad()
    def measure(self, low: Mapping[str, Tensor]) -> list[int]:
        """The numerical rank of each remembered layer's update, on every rank.

        One layer is whole at a time; the ranks take turns with the SVDs.
        """
        world = self.engine.world
        merged = MergedWeights(self.engine, low)
        ranks = []
        for turn, (name, local) in enumerate(self.initial.items()):
            before = merged.dense(name, merged.base[name].shard.like(local))
            after = merged.whole(name, on=turn % world.size)
            ranks.append(0 if after is None else numerical_rank(after.sub_(before)))
        return [int(rank) for rank in world.sum(*ranks)]


def numerical_rank(matrix: Tensor) -> int:
    """Singular values above ``RELATIVE_THRESHOLD`` of the largest; 0 for a zero matrix."""
    values = torch.linalg.svdvals(matrix)
    return int((values > RELATIVE_THRESHOLD * values[0]).sum()) if values[0] > 0 else 0
