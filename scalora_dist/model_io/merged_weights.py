"""Gathers the merged model's weights, one full tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.split_precision import join_halves
from scalora_dist.engines.base import Engine
from scalora_dist.layers.adapted_linear import AdaptedLinear, adapted_linear, own_parameters
from scalora_dist.layers.fourbit_linear import FourBitLinear
from scalora_dist.layers.peft_layers import merged_by_peft


class MergedWeights:
    """Gathers one parameter of the merged model at a time, and merges it on one rank.

    Attributes:
        base: {name: this rank's shard of a parameter of the loaded model}.
        added: {name: this rank's shard of a parameter that the method added}.
        fourbit: {name of W: its 4-bit layer}.
    """

    def __init__(self, engine: Engine, low_halves: Mapping[str, Tensor]) -> None:
        """
        Args:
            low_halves: {parameter: low halves of its 16-bit values}, int16.
        """
        self.engine = engine
        self.low_halves = low_halves
        self.device = engine.world.device
        self.base = {p.name: p for p in engine.base_shards()}
        self.added = {p.name: p for p in engine.added_shards()}
        self.fourbit = {
            f"{name}.weight": module
            for name, module in engine.model.named_modules()
            if isinstance(module, FourBitLinear)
        }

    @torch.no_grad()
    def full_tensor(self, name: str, *, on_rank: int) -> Tensor | None:
        """A full parameter of the loaded model; of an adapted layer, the merged W. Collective.

        Args:
            name: the parameter's name.
            on_rank: the rank that gets the tensor. The others get None.

        Returns:
            The tensor: float32 for W of an adapted layer, else the same as from ``precise``.
        """
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in self.engine.adapted:
            whole = self.precise(name)
            return whole if self.engine.world.rank == on_rank else None
        weight = self.precise(name).float()
        module = self.engine.adapted[layer]
        own = {key: self.precise(f"{layer}.{key}").float() for key in own_parameters(module)}
        if self.engine.world.rank != on_rank:
            return None
        if weight.data_ptr() == self.base[name].shard.local.data_ptr():
            weight = weight.clone()  # an fp32 W that is not sharded is the engine's own storage
        if isinstance(module, AdaptedLinear):
            module.merge_(weight, own)
            return weight
        if adapted_linear(module) is module:
            return weight  # W itself is trained
        return merged_by_peft(module, weight, own)

    def shape(self, name: str) -> torch.Size:
        """The shape of ``full_tensor(name)``."""
        if fourbit := self.fourbit.get(name):
            return torch.Size([fourbit.out_features, fourbit.in_features])
        return (self.base.get(name) or self.added[name]).shape

    def precise(self, name: str) -> Tensor:
        """A full parameter without its adapter, on every rank. Collective.

        It is float32 if it has low halves (then exact) or is stored in 4 bits, else it keeps its
        dtype.
        """
        return self.dense(name, self.precise_shard(name)).view(self.shape(name))

    def precise_shard(self, name: str) -> FlatShard:
        """This rank's shard of a parameter: exact in float32 if it has low halves. Local."""
        shard = (self.base.get(name) or self.added[name]).shard
        low = self.low_halves.get(name)
        return shard if low is None else shard.like(join_halves(shard.local, low))

    def dense(self, name: str, shard: FlatShard) -> Tensor:
        """The full tensor of ``shard``; a 4-bit weight is dequantized to float32. Collective.

        Args:
            name: the parameter's name.
            shard: this rank's shard of that parameter or of a copy.
        """
        whole = shard.full_tensor(self.device)
        if fourbit := self.fourbit.get(name):
            return fourbit.dense(whole, torch.float32)
        return whole
