"""Measures the rank of the accumulated update: the merged weight minus the initial weight W_0."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from scalora_dist.config.model import ModelArguments
from scalora_dist.config.options import Options
from scalora_dist.core.rank_sketch import numerical_rank
from scalora_dist.engines.broadcast import broadcast_from_rank_0
from scalora_dist.errors import UserError
from scalora_dist.methods.rank_monitor import spread_out
from scalora_dist.methods.runner import MethodRunner
from scalora_dist.model_io.base_weights import BaseWeights
from scalora_dist.model_io.merged_weights import MergedWeights
from scalora_dist.model_io.parameters import EngineParameters

logger = logging.getLogger(__name__)


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

    def __init__(self, runner: MethodRunner, options: Options, model: ModelArguments) -> None:
        """
        Args:
            runner: the runner of the method. Its engine must hold the weights as loaded.
            model: the options to read the base model by.
        """
        self.engine = engine = runner.engine
        chosen = spread_out(list(engine.adapted), options.train.update_rank_layers)
        self.weights = [f"{name}.weight" for name in chosen]
        trained = {shard.name for shard in engine.trained_shards(gradients=False)}
        self.changes = runner.edits_weights or not trained.isdisjoint(self.weights)
        shards = {p.name: p.shard for p in engine.base_shards() if p.name in self.weights}

        self.base: BaseWeights | None = None

        def open_base() -> str:
            """Open the base. Returns why it cannot be read; empty if it can."""
            try:
                self.base = BaseWeights(model, engine.dtype).opened()
                self.base.check_here(shards)
            except UserError as error:
                return str(error)
            return ""

        if self.changes and (reason := engine.world.json_from_rank_0(open_base)):
            self.weights = _unknown(reason)

    @torch.no_grad()
    def measure(self, low_halves: Mapping[str, Tensor]) -> list[int]:
        """The numerical rank of each layer's update, the same on every rank. A collective.

        One layer at a time is gathered in full. The ranks take turns with the SVDs. It is empty,
        with a warning, where an initial weight cannot be read again.

        Args:
            low_halves: {parameter: low halves of its 16-bit values}, int16.
        """
        world = self.engine.world
        parameters = EngineParameters(self.engine, low_halves)
        merged = MergedWeights(parameters)
        ranks = []
        for turn, name in enumerate(self.weights):
            before = self._initial(name, parameters)
            if isinstance(before, str):
                return _unknown(before)
            after = merged.full_tensor(name, on_rank=turn % world.size)
            ranks.append(0 if after is None else numerical_rank(after.sub_(before)))
        return [int(rank) for rank in world.sum(*ranks)]

    def _initial(self, name: str, parameters: EngineParameters) -> Tensor | str:
        """A full initial weight (m, n) on every rank, or why it cannot be read. A collective."""
        if not self.changes:
            return parameters.dense(name, parameters.shard(name))
        world = self.engine.world

        read = torch.empty(parameters.shape(name), dtype=torch.float32, device="meta")

        def read_again() -> str:
            nonlocal read
            assert self.base is not None
            try:
                read = self.base.read(name).float()
            except (UserError, OSError, SafetensorError) as error:  # the files have gone since
                return str(error)
            return ""

        return world.json_from_rank_0(read_again) or broadcast_from_rank_0(read, world)


def _unknown(reason: str) -> list[Any]:
    """Warn that the rank will not be known. Returns what is known: nothing."""
    logger.warning("the rank of the update is left out (--update_rank_layers): %s", reason)
    return []
