"""What the trainer and the rescale ask of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scalora_dist.adapters.layers import LowRankLinear
from scalora_dist.shards import FlatShard
from scalora_dist.world import World


@dataclass(frozen=True)
class LayerShards:
    """This rank's shards of one adapted layer between the last backward and the optimizer's step.

    All are views of the engine's own storage. W is (m, n); A and its gradient and moments (m, r);
    B and its (n, r). A and B are the fp32 masters. Each factor's gradient and moments have that
    factor's range; W's range need not agree with A's. Gradients may be 16-bit and carry the loss
    scale. ``moments_*`` are (m, v), empty before the first step.
    """

    name: str
    scaling: float
    W: FlatShard
    A: FlatShard
    B: FlatShard
    grad_A: FlatShard
    grad_B: FlatShard
    moments_A: tuple[FlatShard, ...]
    moments_B: tuple[FlatShard, ...]


def factor_shards(layers: Sequence[LayerShards]) -> list[FlatShard]:
    """A and B of each layer in turn: the order of every ``Layout`` over factors."""
    return [factor for layer in layers for factor in (layer.A, layer.B)]


def gradient_shards(layers: Sequence[LayerShards]) -> list[FlatShard]:
    """∇A and ∇B of each layer in turn, as ``factor_shards`` has A and B."""
    return [grad for layer in layers for grad in (layer.grad_A, layer.grad_B)]


class NamedShard(NamedTuple):
    """A parameter of the model under its own name and shape, as one flat range of a matrix."""

    name: str
    shape: torch.Size
    shard: FlatShard


class Engine(ABC):
    """A sharded model with its optimizer.

    Order of calls: construct, build the model inside ``loading()``, ``attach``, then
    per step ``backward`` once per micro-batch and ``step``.
    """

    world: World
    dtype: torch.dtype  # of the weights that the forward reads
    module: nn.Module  # what to call for a forward; set by attach
    optimizer: torch.optim.Optimizer  # whose param_groups hold the learning rate; set by attach

    @abstractmethod
    def loading(self) -> AbstractContextManager[None]:
        """Inside it, ``from_pretrained`` builds the model as the engine wants it (sharded)."""

    @abstractmethod
    def attach(
        self,
        model: nn.Module,
        layers: Mapping[str, LowRankLinear],
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        """Shard ``model`` and train the parameters that require a gradient."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradients: they are SUMMED over micro-batches and ranks.

        Args:
            last: whether this is the accumulation's last micro-batch.
        """

    @abstractmethod
    def step(self, transform: Callable[[list[LayerShards]], bool]) -> bool:
        """``transform`` the layers in place, clip, step the optimizer and drop the gradients.

        A transform that returns False has changed nothing, and discards the step on all ranks: no
        parameter and no state changes (fp16 lowers its loss scale). Returns whether it was applied.
        """

    @property
    @abstractmethod
    def loss_scale(self) -> float:
        """How many times too large the stored gradients are (fp16), else 1."""

    @abstractmethod
    def layers(self, *, gradients: bool = True) -> list[LayerShards]:
        """The adapted layers in model order, the same on every rank.

        Without ``gradients`` (outside ``step``), ``grad_A`` and ``grad_B`` stand for the
        masters.
        """

    @abstractmethod
    def frozen(self) -> Iterator[NamedShard]:
        """Every frozen parameter once, in model order, the same on every rank."""
