"""Gathers the merged model's weights, one full tensor at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from scalora_dist.layers.adapted_linear import AdaptedLinear, adapted_linear, own_parameters
from scalora_dist.layers.peft_layers import merged_by_peft
from scalora_dist.model_io.parameters import Parameters


class MergedWeights:
    """Gathers one parameter of the merged model at a time, and merges it on one rank."""

    def __init__(self, parameters: Parameters) -> None:
        """
        Args:
            parameters: of the trained model and its method.
        """
        self.parameters = parameters

    @torch.no_grad()
    def full_tensor(self, name: str, *, on_rank: int) -> Tensor | None:
        """A full parameter of the loaded model; of an adapted layer, the merged W. Collective.

        Args:
            name: the parameter's name.
            on_rank: the rank that gets the tensor. The others get None.

        Returns:
            The tensor: float32 for W of an adapted layer, else the same as from ``precise``.
        """
        parameters = self.parameters
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in parameters.adapted:
            whole = self.precise(name)
            return whole if parameters.rank == on_rank else None
        shard = parameters.shard(name)
        weight = parameters.dense(name, shard).float()
        module = parameters.adapted[layer]
        own = {key: self.precise(f"{layer}.{key}").float() for key in own_parameters(module)}
        if parameters.rank != on_rank:
            return None
        if weight.data_ptr() == shard.local.data_ptr():
            weight = weight.clone()  # an fp32 W that is not sharded is still in use there
        if isinstance(module, AdaptedLinear):
            module.merge_(weight, own)
            return weight
        if adapted_linear(module) is module:
            return weight  # W itself is trained
        return merged_by_peft(module, weight, own)

    def precise(self, name: str) -> Tensor:
        """A full parameter without its adapter, on every rank. Collective.

        It is float32 if it has low halves (then exact) or is stored in 4 bits, else it keeps its
        dtype.
        """
        return self.parameters.dense(name, self.parameters.shard(name))
