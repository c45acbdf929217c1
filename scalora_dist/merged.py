"""Adapted layers' weights with what was trained merged in, whole, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from scalora_dist.adapters.layers import AdaptedLinear, adapted_linear
from scalora_dist.adapters.peft import merged_by_peft
from scalora_dist.engines.base import Engine, NamedShard
from scalora_dist.merge import join_halves
from scalora_dist.shards import FlatShard, Layout


class MergedWeights:
    """Gathers one parameter of the merged model at a time; no rank holds more than that."""

    def __init__(self, engine: Engine, low: Mapping[str, Tensor]) -> None:
        """
        Args:
            low: {layer: int16 remainders of its 16-bit W} (``Merger.low``).
        """
        self.engine, self.low, self.device = engine, low, engine.world.device
        self.base = {p.name: p for p in engine.base()}
        self.added: dict[str, list[NamedShard]] = {name: [] for name in engine.adapted}
        for parameter in engine.added():
            layer = max((n for n in engine.adapted if parameter.name.startswith(f"{n}.")), key=len)
            self.added[layer].append(parameter)

    @torch.no_grad()
    def whole(self, name: str) -> Tensor:
        """A parameter of the loaded model by name, merged if it is an adapted layer's W: float32.

        On every rank; a collective. A parameter that no method touches keeps its dtype.
        """
        parameter = self.base[name]
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in self.engine.adapted:
            return self._gather(parameter.shard).view(parameter.shape)
        shard, low = parameter.shard, self.low.get(layer)
        full = shard.local.float() if low is None else join_halves(shard.local, low)
        weight = self._gather(shard.like(full))
        own = {
            p.name.removeprefix(f"{layer}."): self._gather(p.shard).float().view(p.shape)
            for p in self.added[layer]
        }
        module = self.engine.adapted[layer]
        if isinstance(module, AdaptedLinear):
            return weight + module.scaling * module.delta(own)
        if adapted_linear(module) is module:
            return weight  # trained itself
        return cast(Tensor, merged_by_peft(module, weight, own))

    def _gather(self, shard: FlatShard) -> Tensor:
        (whole,) = Layout.of([shard], self.device).gather([shard], range(1))
        return whole
