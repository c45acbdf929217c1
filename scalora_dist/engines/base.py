"""What the trainer and the rescale ask of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalora_dist.adapters.layers import LowRankLinear
from scalora_dist.shards import FlatShard
from scalora_dist.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")  # the names of m and v in torch's AdamW


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


class Places(ABC):
    """Where an engine keeps this rank's part of a parameter, as views that writes stick to."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @abstractmethod
    def weight(self, p: Tensor) -> FlatShard:
        """A frozen weight."""

    @abstractmethod
    def master(self, p: nn.Parameter) -> FlatShard:
        """The fp32 master of a trained parameter."""

    @abstractmethod
    def gradient(self, p: nn.Parameter) -> Tensor:
        """The reduced gradient of the master's range, from the last backward to the step."""

    @abstractmethod
    def moments(self, p: nn.Parameter) -> list[Tensor]:
        """AdamW's m and v of the master's range; [] before they exist."""

    def stepped(self) -> list[Tensor]:
        """The tensors whose state the optimizer keeps: masters, or flat buffers of them."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


class Engine(ABC):
    """A sharded model with its optimizer.

    Order of calls: construct, build the model inside ``loading()``, ``attach``, then
    per step ``backward`` once per micro-batch and ``step``.
    """

    world: World
    dtype: torch.dtype  # of the weights as they are kept
    reads_weights = True  # whether this rank loads the model, or only its shape (on "meta")
    model: nn.Module  # set by attach, as all below
    module: nn.Module  # what to call for a forward
    optimizer: torch.optim.Optimizer  # AdamW, whose param_groups hold the learning rate
    places: Places
    adapted: Mapping[str, LowRankLinear]  # in model order

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

    def layers(self, *, gradients: bool = True) -> list[LayerShards]:
        """The adapted layers in model order, the same on every rank.

        Without ``gradients`` (outside ``step``), ``grad_A`` and ``grad_B`` stand for the
        masters.
        """
        return [self._layer(name, layer, gradients) for name, layer in self.adapted.items()]

    def _layer(self, name: str, layer: LowRankLinear, gradients: bool) -> LayerShards:
        factors: dict[str, Any] = {}
        for key, parameter in (("A", layer.A), ("B", layer.B)):
            master = self.places.master(parameter)
            local = self.places.gradient(parameter).view(-1) if gradients else master.local
            factors[key] = master
            factors[f"grad_{key}"] = master.like(local)
            factors[f"moments_{key}"] = tuple(
                master.like(moment) for moment in self.places.moments(parameter)
            )
        return LayerShards(
            name=name, scaling=layer.scaling, W=self.places.weight(layer.weight), **factors
        )

    def frozen(self) -> Iterator[NamedShard]:
        """Every frozen parameter once, in model order, the same on every rank."""
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                # Under ZeRO-3 a parameter's own shape is empty; ds_shape is then the true one.
                shape = getattr(parameter, "ds_shape", parameter.shape)
                yield NamedShard(name, shape, self.places.weight(parameter))

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides ``layers()``: a few numbers, the same on every rank."""
        states = [self.optimizer.state.get(tensor) for tensor in self.places.stepped()]
        return {"optimizer_steps": next((int(state["step"]) for state in states if state), 0)}

    @contextmanager
    def restoring(self, state: Mapping[str, Any]) -> Iterator[list[LayerShards]]:
        """Go back to ``state``; inside it, copy a checkpoint into the layers it yields.

        Their moments exist, unless the optimizer had not stepped yet. Afterwards the forward reads
        what was written.
        """
        if steps := state["optimizer_steps"]:
            for tensor in self.places.stepped():
                self.optimizer.state[tensor] = {
                    "step": torch.tensor(float(steps)),
                    **{key: torch.zeros_like(tensor) for key in MOMENTS},
                }
        with torch.no_grad():
            yield self.layers(gradients=False)


def as_matrix(shape: torch.Size) -> tuple[int, int]:
    """Any parameter's shape as (rows, cols), for a FlatShard."""
    return (shape[0], shape[1:].numel()) if len(shape) else (1, 1)
