"""Adapted layers' weights with what was trained merged in, whole, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from scalora_dist.adapters.fourbit import FourBitLinear
from scalora_dist.adapters.layers import AdaptedLinear, adapted_linear, own_parameters
from scalora_dist.adapters.peft import merged_by_peft
from scalora_dist.engines.base import Engine
from scalora_dist.merge import join_halves
from scalora_dist.shards import FlatShard


class MergedWeights:
    """Gathers one parameter of the merged model at a time, and merges it on one rank."""

    def __init__(self, engine: Engine, low: Mapping[str, Tensor]) -> None:
        """
        Args:
            low: {parameter: int16 remainders of its 16-bit values} (``MergeTarget.low``).
        """
        self.engine, self.low, self.device = engine, low, engine.world.device
        self.base = {p.name: p for p in engine.base()}
        self.added = {p.name: p for p in engine.added()}
        self.fourbit = {
            f"{name}.weight": module
            for name, module in engine.model.named_modules()
            if isinstance(module, FourBitLinear)
        }

    @torch.no_grad()
    def whole(self, name: str, *, on: int) -> Tensor | None:
        """A parameter of the loaded model by name, merged if it is an adapted layer's W: float32.

        On rank ``on``, None elsewhere; a collective. What no method touches keeps its dtype.
        """
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in self.engine.adapted:
            whole = self.precise(name)
            return whole if self.engine.world.rank == on else None
        weight = self.precise(name).float()
        module = self.engine.adapted[layer]
        own = {key: self.precise(f"{layer}.{key}").float() for key in own_parameters(module)}
        if self.engine.world.rank != on:
            return None
        if weight.data_ptr() == self.base[name].shard.local.data_ptr():
            weight = weight.clone()  # a whole fp32 W is the engine's own
        if isinstance(module, AdaptedLinear):
            module.merge_(weight, own)
            return weight
        if adapted_linear(module) is module:
            return weight  # trained itself
        return cast(Tensor, merged_by_peft(module, weight, own))

    def shape(self, name: str) -> torch.Size:
        """Of ``whole(name)``."""
        if fourbit := self.fourbit.get(name):
            return torch.Size([fourbit.out_features, fourbit.in_features])
        return (self.base.get(name) or self.added[name]).shape

    def precise(self, name: str) -> Tensor:
        """A parameter as it is, on every rank: exact where it was merged into, 4 bits as float32.

        A collective.
        """
        return self.dense(name, self.precise_shard(name)).view(self.shape(name))

    def precise_shard(self, name: str) -> FlatShard:
        """This rank's range of a parameter: float32 where 16 bits were merged into; local."""
        shard = (self.base.get(name) or self.added[name]).shard
        low = self.low.get(name)
        return shard if low is None else shard.like(join_halves(shard.local, low))

    def dense(self, name: str, shard: FlatShard) -> Tensor:
        """``shard``, of the parameter ``name`` or a copy of it, whole; 4 bits as float32."""
        whole = shard.whole(self.device)
        if fourbit := self.fourbit.get(name):
            return fourbit.dense(whole, torch.float32)
        return whole
