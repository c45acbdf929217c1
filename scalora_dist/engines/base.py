"""What the trainer and the rescale ask of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from scalora_dist.adapters.carry import CarryLinear
from scalora_dist.adapters.layers import LowRankLinear, adapted_linear, own_parameters
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
    carry: tuple[FlatShard, FlatShard] | None = None


def factor_shards(layers: Sequence[LayerShards]) -> list[FlatShard]:
    """A and B of each layer in turn: the order of every ``Layout`` over factors."""
    return [factor for layer in layers for factor in (layer.A, layer.B)]


def gradient_shards(layers: Sequence[LayerShards]) -> list[FlatShard]:
    """∇A and ∇B of each layer in turn, as ``factor_shards`` has A and B."""
    return [grad for layer in layers for grad in (layer.grad_A, layer.grad_B)]


@dataclass(frozen=True)
class Trained:
    """This rank's range of one trained parameter, as views of the engine's own storage.

    Attributes:
        master: fp32. gradient: may be 16-bit and carry the loss scale; stands for the master
            where gradients were not asked for. moments: (m, v), empty before the first step.
    """

    name: str
    master: FlatShard
    gradient: FlatShard
    moments: tuple[FlatShard, ...]


class NamedShard(NamedTuple):
    """A parameter under its name in the model and with its shape, as a flat range of a matrix."""

    name: str
    shape: torch.Size
    shard: FlatShard


class Places(ABC):
    """Where an engine keeps this rank's part of a parameter, as views that writes stick to."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @abstractmethod
    def weight(self, p: Tensor) -> FlatShard:
        """A frozen parameter."""

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


# From {name: trained parameter} as the engine shows it to the optimizer.
MakeOptimizer: TypeAlias = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]


class Engine(ABC):
    """A sharded model with its optimizer.

    Order of calls: construct, build the model inside ``loading()``, ``attach``, then
    per step ``backward`` once per micro-batch and ``step``.
    """

    world: World
    dtype: torch.dtype  # of the weights as they are kept
    # Whether each rank trains on whole weights, which are best read straight to its device.
    whole = False
    one_reader = False  # whether rank 0 alone loads the model, the others its shape (on "meta")
    model: nn.Module  # set by attach, as all below
    module: nn.Module  # what to call for a forward
    optimizer: torch.optim.Optimizer  # AdamW, whose param_groups hold the learning rate
    places: Places
    adapted: Mapping[str, nn.Module]  # the layers a method adapts by name, in model order

    @abstractmethod
    def loading(self) -> AbstractContextManager[None]:
        """Inside it, ``from_pretrained`` builds the model as the engine wants it (sharded)."""

    @abstractmethod
    def attach(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        make_optimizer: MakeOptimizer,
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
        """``transform`` in place, clip, step the optimizer and drop the gradients.

        The transform is given ``layers()``, and may ask for ``trained()``. One that returns False
        has changed nothing, and discards the step on all ranks: no parameter and no state changes
        (fp16 lowers its loss scale). Returns whether it was applied.
        """

    def release(self) -> None:  # noqa: B027 (most engines leave nothing gathered)
        """Free the weights that a forward or a backward outside of a step left gathered.

        They would not show what is written into their shards afterwards.
        """

    @property
    @abstractmethod
    def loss_scale(self) -> float:
        """How many times too large the stored gradients are (fp16), else 1."""

    def layers(self, *, gradients: bool = True) -> list[LayerShards]:
        """The layers with factors A and B in model order, the same on every rank.

        Without ``gradients`` (outside ``step``), ``grad_A`` and ``grad_B`` stand for the
        masters.
        """
        return [
            self._layer(name, layer, gradients)
            for name, layer in self.adapted.items()
            if isinstance(layer, LowRankLinear)
        ]

    def _layer(self, name: str, layer: LowRankLinear, gradients: bool) -> LayerShards:
        a, b = (self._trained(key, p, gradients) for key, p in (("A", layer.A), ("B", layer.B)))
        carry = None
        if isinstance(layer, CarryLinear):
            carry = self.places.weight(layer.C), self.places.weight(layer.D)
        return LayerShards(
            name=name,
            scaling=layer.scaling,
            W=self.places.weight(layer.weight),
            A=a.master,
            B=b.master,
            grad_A=a.gradient,
            grad_B=b.gradient,
            moments_A=a.moments,
            moments_B=b.moments,
            carry=carry,
        )

    def trained(self, *, gradients: bool = True) -> list[Trained]:
        """Every trained parameter in model order; ``gradients`` as for ``layers``."""
        return [
            self._trained(name, p, gradients)
            for name, p in self.model.named_parameters()
            if p.requires_grad
        ]

    def _trained(self, name: str, p: nn.Parameter, gradients: bool) -> Trained:
        master = self.places.master(p)
        local = self.places.gradient(p).view(-1) if gradients else master.local
        moments = tuple(master.like(moment) for moment in self.places.moments(p))
        return Trained(name, master, master.like(local), moments)

    def base(self) -> Iterator[NamedShard]:
        """Every parameter that the model was loaded with, once, in model order."""
        added = {id(p) for layer in self.adapted.values() for p in own_parameters(layer).values()}
        loaded: dict[int, str] = {}  # where a layer was wrapped, by the name it had before
        for name, layer in self.adapted.items():
            linear = adapted_linear(layer)
            loaded |= {id(linear.weight): f"{name}.weight", id(linear.bias): f"{name}.bias"}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in added:
                yield self._named(loaded.get(id(parameter), name), parameter)

    def added(self) -> Iterator[NamedShard]:
        """Every parameter that the method added, trained or not, in model order."""
        for name, layer in self.adapted.items():
            for key, parameter in own_parameters(layer).items():
                yield self._named(f"{name}.{key}", parameter)

    def _named(self, name: str, p: nn.Parameter) -> NamedShard:
        # Under ZeRO-3 a parameter's own shape is empty; ds_shape is then the true one.
        shape = getattr(p, "ds_shape", p.shape)
        place = self.places.master if p.requires_grad else self.places.weight
        return NamedShard(name, shape, place(p))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Between steps: afterwards the forward reads what was written into shards inside it."""
        with torch.no_grad():
            yield

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides ``layers()``: a few numbers, the same on every rank."""
        states = [self.optimizer.state.get(tensor) for tensor in self.places.stepped()]
        return {"optimizer_steps": next((int(state["step"]) for state in states if state), 0)}

    @contextmanager
    def restoring(self, state: Mapping[str, Any]) -> Iterator[None]:
        """Go back to ``state``; inside it, copy a checkpoint into the engine's shards.

        Their moments exist, unless the optimizer had not stepped yet.
        """
        if steps := state["optimizer_steps"]:
            for tensor in self.places.stepped():
                self.optimizer.state[tensor] = {
                    "step": torch.tensor(float(steps)),
                    **{key: torch.zeros_like(tensor) for key in MOMENTS},
                }
        with self.writing():
            yield


def as_matrix(shape: torch.Size) -> tuple[int, int]:
    """Any parameter's shape as (rows, cols), for a FlatShard."""
    return (shape[0], shape[1:].numel()) if len(shape) else (1, 1)
