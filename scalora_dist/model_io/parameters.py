"""Where the full tensors of a trained model come from: here, an engine's shards."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.layout import full_tensor
from scalora_dist.core.split_precision import join_halves
from scalora_dist.engines.base import Engine
from scalora_dist.layers.fourbit_linear import fourbit_weights


class Parameters(Protocol):
    """The parameters of a trained model and of its method, each in parts on some ranks.

    Attributes:
        adapted: {name: layer that the method adapts}, in model order.
        loaded: names of the parameters of the loaded model. Of tied ones, one.
        modules: names of all modules of the model.
        rank: this process's rank.
        device: device that full tensors are gathered on.
    """

    @property
    def adapted(self) -> Mapping[str, nn.Module]: ...

    @property
    def loaded(self) -> Collection[str]: ...

    @property
    def modules(self) -> Collection[str]: ...

    @property
    def rank(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def shape(self, name: str) -> torch.Size:
        """The full shape of a parameter."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a parameter of the loaded model is kept in."""

    def shard(self, name: str) -> FlatShard:
        """This rank's shard of a parameter: float32 if that is more exact than what is stored.

        A weight in 4 bits has the codes.
        """

    def dense(self, name: str, shard: FlatShard) -> Tensor:
        """The full tensor of ``shard``; a 4-bit weight is dequantized to float32. Collective.

        Args:
            name: the parameter's name.
            shard: this rank's shard of that parameter or of a copy.
        """


class EngineParameters:
    """The parameters of an engine's sharded model. The attributes are those of ``Parameters``."""

    def __init__(self, engine: Engine, low_halves: Mapping[str, Tensor]) -> None:
        """
        Args:
            low_halves: {parameter: low halves of its 16-bit values}, int16.
        """
        self.low_halves = low_halves
        self.adapted = engine.adapted
        self.rank, self.device = engine.world.rank, engine.world.device
        self.modules = dict(engine.model.named_modules()).keys()
        base = {p.name: p for p in engine.base_shards()}
        self.loaded = base.keys()
        self._shards = base | {p.name: p for p in engine.added_shards()}
        self._fourbit = fourbit_weights(engine.model)

    def shape(self, name: str) -> torch.Size:
        if fourbit := self._fourbit.get(name):
            return torch.Size([fourbit.out_features, fourbit.in_features])
        return self._shards[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._shards[name].shard.local.dtype

    def shard(self, name: str) -> FlatShard:
        shard, low = self._shards[name].shard, self.low_halves.get(name)
        return shard if low is None else shard.like(join_halves(shard.local, low))

    def dense(self, name: str, shard: FlatShard) -> Tensor:
        whole = full_tensor(shard, self.device)
        if fourbit := self._fourbit.get(name):
            return fourbit.dense(whole, torch.float32)
        return whole.view(self._shards[name].shape)
