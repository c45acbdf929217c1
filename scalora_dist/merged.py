"""Adapted layers' weights with what was trained merged in, whole, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from scalora_dist.adapters.layers import AdaptedLinear, adapted_linear, own_parameters
from scalora_dist.adapters.peft import merged_by_peft
from scalora_dist.engines.base import Engine
from scalora_dist.merge import join_halves


class MergedWeights:
    """Gathers one parameter of the merged model at a time, and merges it on one rank."""

    def __init__(self, engine: Engine, low: Mapping[str, Tensor]) -> None:
        """
        Args:
            low: {layer: int16 remainders of its 16-bit W} (``Merger.low``).
        """
        self.engine, self.low, self.device = engine, low, engine.world.device
        self.base = {p.name: p for p in engine.base()}
        self.added = {p.name: p for p in engine.added()}

    @torch.no_grad()
    def whole(self, name: str, *, on: int) -> Tensor | None:
        """A parameter of the loaded model by name, merged if it is an adapted layer's W: float32.

        On rank ``on``, None elsewhere; a collective. What no method touches keeps its dtype.
        """
        parameter = self.base[name]
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in self.engine.adapted:
            whole = parameter.shard.whole(self.device).view(parameter.shape)
            return whole if self.engine.world.rank == on else None
        shard, low = parameter.shard, self.low.get(layer)
        full = shard.local.float() if low is None else join_halves(shard.local, low)
        weight = shard.like(full).whole(self.device)
        module = self.engine.adapted[layer]
        own = {}
        for key in own_parameters(module):
            added = self.added[f"{layer}.{key}"]
            own[key] = added.shard.whole(self.device).float().view(added.shape)
        if self.engine.world.rank != on:
            return None
        if weight.data_ptr() == shard.local.data_ptr():
            weight = weight.clone()  # a whole fp32 W is the engine's own
        if isinstance(module, AdaptedLinear):
            module.merge_(weight, own)
            return weight
        if adapted_linear(module) is module:
            return weight  # trained itself
        return cast(Tensor, merged_by_peft(module, weight, own))
