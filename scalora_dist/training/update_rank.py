"""Measures the rank of the accumulated update: the merged weight minus the initial weight W_0."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scalora_dist.config.options import Options
from scalora_dist.core.rank_sketch import numerical_rank
from scalora_dist.engines.broadcast import broadcast_from_rank_0
from scalora_dist.errors import UserError
from scalora_dist.methods.rank_monitor import spread_out
from scalora_dist.methods.runner import MethodRunner
from scalora_dist.model_io.base_weights import BaseWeights
from scalora_dist.model_io.merged_weights import MergedWeights
from scalora_dist.model_io.parameters import EngineParameters


class UpdateRank:
    """Compares some layers' merged weights with their initial ones, which no rank keeps meanwhile.

    A W that the run does not change is its own initial weight. Others are read again from the base
    model's files, on rank 0, one at a time.

    Attributes:
        engine: the engine with the sharded model.
        weights: names of the weights to measure.
        changes: whether the run changes W itself.
        base: reads initial weights; on rank 0 only, and None where no W changes.
    """

    def __init__(self, runner: MethodRunner, options: Options) -> None:
        """
        Args:
            runner: the runner of the method. Its engine must hold the weights as loaded.

        Raises:
            UserError: on every rank, where initial weights must be read again and cannot be.
        """
        self.engine = engine = runner.engine
        chosen = spread_out(list(engine.adapted), options.train.update_rank_layers)
        self.weights = [f"{name}.weight" for name in chosen]
        trained = {shard.name for shard in engine.trained_shards(gradients=False)}
        self.changes = runner.edits_weights or not trained.isdisjoint(self.weights)
        shards = {p.name: p.shard for p in engine.base_shards() if p.name in self.weights}

        def opened() -> BaseWeights:
            try:
                base = BaseWeights(options.model, engine.dtype).opened()
                base.check_here(shards)
            except UserError as error:
                raise UserError(f"{error}, or set --update_rank_layers 0") from error
            return base

        self.base = engine.world.main_only(opened) if self.changes else None

    @torch.no_grad()
    def measure(self, low_halves: Mapping[str, Tensor]) -> list[int]:
        """The numerical rank of each layer's update, the same on every rank. A collective.

        One layer at a time is gathered in full. The ranks take turns with the SVDs.

        Args:
            low_halves: {parameter: low halves of its 16-bit values}, int16.

        Raises:
            UserError: on every rank, where an initial weight cannot be read any more.
        """
        world = self.engine.world
        parameters = EngineParameters(self.engine, low_halves)
        merged = MergedWeights(parameters)
        ranks = []
        for turn, name in enumerate(self.weights):
            before = self._initial(name, parameters)
            after = merged.full_tensor(name, on_rank=turn % world.size)
            ranks.append(0 if after is None else numerical_rank(after.sub_(before)))
        return [int(rank) for rank in world.sum(*ranks)]

    def _initial(self, name: str, parameters: EngineParameters) -> Tensor:
        """A full initial weight (m, n) on every rank. A collective."""
        if not self.changes:
            return parameters.dense(name, parameters.shard(name))
        world = self.engine.world
        read = world.main_only(lambda: self.base.read(name).float() if self.base else None)
        if read is None:  # this is not rank 0
            read = torch.empty(parameters.shape(name), dtype=torch.float32, device="meta")
        return broadcast_from_rank_0(read, world)
