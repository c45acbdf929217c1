"""What the trainer and the rescale ask of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards, NamedShard, TrainedShard
from scalora_dist.layers.adapted_linear import LowRankLinear, adapted_linear, own_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")  # the names of m and v in torch's AdamW


class ParameterShards(ABC):
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

    Order of calls: construct, build the model inside ``loading()``, ``attach``. Then per step
    ``backward`` once per micro-batch, ``layer_shards`` for whoever edits them in place, and
    ``step`` or ``discard_step``.

    Attributes:
        dtype: of the weights as they are kept.
        keeps_whole_weights: whether each rank trains on whole weights. Those are best read straight
            to its device.
        loads_on_rank_0: whether rank 0 alone reads the model's files. The others build it
            on "meta".
        model: the model itself; set by ``attach``, as are all attributes below.
        module: what to call for a forward.
        optimizer: AdamW, whose param_groups hold the learning rate.
        shards: where this rank's part of each parameter is.
        adapted: {name: layer that the method adapts}, in model order.
    """

    world: World
    dtype: torch.dtype
    keeps_whole_weights = False
    loads_on_rank_0 = False
    model: nn.Module
    module: nn.Module
    optimizer: torch.optim.Optimizer
    shards: ParameterShards
    adapted: Mapping[str, nn.Module]

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

    def shape_of(self, p: Tensor) -> torch.Size:
        """A parameter's whole shape, even where this engine cut it up; valid before ``attach``."""
        return p.shape

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradients: they are SUMMED over micro-batches and ranks.

        Args:
            last: whether this is the accumulation's last micro-batch. If it is, the gradients are
                reduced when this returns, and ``layer_shards`` shows them.
        """

    @abstractmethod
    def step(self) -> None:
        """Clip the gradients, step the optimizer and drop the gradients."""

    @abstractmethod
    def discard_step(self) -> None:
        """Drop the gradients on all ranks: no parameter and no state changes.

        fp16 lowers its loss scale.
        """

    def release(self) -> None:  # noqa: B027 (most engines leave nothing gathered)
        """Free the weights that a forward or a backward outside of a step left gathered.

        They would not show what is written into their shards afterwards.
        """

    @property
    @abstractmethod
    def loss_scale(self) -> float:
        """How many times too large the stored gradients are (fp16), else 1."""

    def layer_shards(self, *, gradients: bool = True) -> list[LayerShards]:
        """This rank's shards of the layers with factors A and B, in model order.

        Args:
            gradients: False between steps, when there are none: then ``grad_A`` and ``grad_B``
                stand for the masters.
        """
        return [
            self._layer(name, layer, gradients)
            for name, layer in self.adapted.items()
            if isinstance(layer, LowRankLinear)
        ]

    def _layer(self, name: str, layer: LowRankLinear, gradients: bool) -> LayerShards:
        a, b = (self._trained(key, p, gradients) for key, p in (("A", layer.A), ("B", layer.B)))
        carry = None
        if layer.carried:
            C, D = layer.carried
            carry = self.shards.weight(C), self.shards.weight(D)
        return LayerShards(
            name=name,
            scaling=layer.scaling,
            W=self.shards.weight(layer.weight),
            A=a.master,
            B=b.master,
            grad_A=a.gradient,
            grad_B=b.gradient,
            moments_A=a.moments,
            moments_B=b.moments,
            carry=carry,
        )

    def trained_shards(self, *, gradients: bool = True) -> list[TrainedShard]:
        """Every trained parameter in model order; ``gradients`` as for ``layer_shards``."""
        return [
            self._trained(name, p, gradients)
            for name, p in self.model.named_parameters()
            if p.requires_grad
        ]

    def _trained(self, name: str, p: nn.Parameter, gradients: bool) -> TrainedShard:
        master = self.shards.master(p)
        local = self.shards.gradient(p).view(-1) if gradients else master.local
        moments = tuple(master.like(moment) for moment in self.shards.moments(p))
        return TrainedShard(name, master, master.like(local), moments)

    def base_shards(self) -> Iterator[NamedShard]:
        """Every parameter that the model was loaded with, once, in model order."""
        added = {id(p) for layer in self.adapted.values() for p in own_parameters(layer).values()}
        loaded: dict[int, str] = {}  # where a layer was wrapped, by the name it had before
        for name, layer in self.adapted.items():
            linear = adapted_linear(layer)
            loaded |= {id(linear.weight): f"{name}.weight", id(linear.bias): f"{name}.bias"}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in added:
                yield self._named(loaded.get(id(parameter), name), parameter)

    def added_shards(self) -> Iterator[NamedShard]:
        """Every parameter that the method added, trained or not, in model order."""
        for name, layer in self.adapted.items():
            for key, parameter in own_parameters(layer).items():
                yield self._named(f"{name}.{key}", parameter)

    def _named(self, name: str, p: nn.Parameter) -> NamedShard:
        shard = self.shards.master(p) if p.requires_grad else self.shards.weight(p)
        return NamedShard(name, self.shape_of(p), shard)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Between steps: afterwards the forward reads what was written into shards inside it."""
        with torch.no_grad():
            yield

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides shards: a few numbers, the same on every rank."""
        states = [self.optimizer.state.get(tensor) for tensor in self.shards.stepped()]
        return {"optimizer_steps": next((int(state["step"]) for state in states if state), 0)}

    @contextmanager
    def restoring(self, state: Mapping[str, Any]) -> Iterator[None]:
        """Go back to ``state``; inside it, copy a checkpoint into the engine's shards.

        Their moments exist, unless the optimizer had not stepped yet.
        """
        if steps := state["optimizer_steps"]:
            for tensor in self.shards.stepped():
                self.optimizer.state[tensor] = {
                    "step": torch.tensor(float(steps)),
                    **{key: torch.zeros_like(tensor) for key in MOMENTS},
                }
        with self.writing():
            yield
