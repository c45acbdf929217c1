"""Measures the rank of the accumulated update: the merged weight minus the initial weight W_0."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scalora_dist.core.rank_sketch import numerical_rank
from scalora_dist.engines.base import Engine
from scalora_dist.methods.rank_monitor import spread_out
from scalora_dist.model_io.merged_weights import MergedWeights
from scalora_dist.model_io.parameters import EngineParameters


class UpdateRank:
    """Keeps copies of this rank's shards of some layers' initial weights, to compare at the end."""

    def __init__(self, engine: Engine, count: int) -> None:
        self.engine = engine
        weights = {p.name: p.shard for p in engine.base_shards()}
        self.initial = {
            f"{name}.weight": weights[f"{name}.weight"].local.clone()
            for name in spread_out(list(engine.adapted), count)
        }

    @torch.no_grad()
    def measure(self, low_halves: Mapping[str, Tensor]) -> list[int]:
        """The numerical rank of each kept layer's update, the same on every rank. A collective.

        One layer at a time is gathered in full. The ranks take turns with the SVDs.

        Args:
            low_halves: {parameter: low halves of its 16-bit values}, int16.
        """
        world = self.engine.world
        parameters = EngineParameters(self.engine, low_halves)
        merged = MergedWeights(parameters)
        ranks = []
        for turn, (name, local) in enumerate(self.initial.items()):
            before = parameters.dense(name, parameters.shard(name).like(local))
            after = merged.full_tensor(name, on_rank=turn % world.size)
            ranks.append(0 if after is None else numerical_rank(after.sub_(before)))
        return [int(rank) for rank in world.sum(*ranks)]
