"""The interface of an engine, which the trainer and the methods use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards, NamedShard, TrainedShard
from scalora_dist.layers.adapted_linear import LowRankLinear, adapted_linear, own_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")  # the names of m and v in torch's AdamW


class ParameterShards(ABC):
    """Finds this rank's part of a parameter in the engine's storage.

    All results are views: writes to them change the engine's storage.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @abstractmethod
    def weight(self, p: Tensor) -> FlatShard:
        """This rank's shard of a frozen parameter."""

    @abstractmethod
    def master(self, p: nn.Parameter) -> FlatShard:
        """This rank's shard of a trained parameter's fp32 master."""

    @abstractmethod
    def gradient(self, p: nn.Parameter) -> Tensor:
        """The reduced gradient of the master's range. Valid from the last backward to the step."""

    @abstractmethod
    def moments(self, p: nn.Parameter) -> list[Tensor]:
        """AdamW's moments [m, v] of the master's range; [] before they exist."""

    def stepped(self) -> list[Tensor]:
        """The tensors for which the optimizer keeps state: masters, or flat buffers of them."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


# Makes the optimizer from {name: trained parameter}, as the engine shows them to the optimizer.
MakeOptimizer: TypeAlias = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]


class Engine(ABC):
    """A sharded model with its optimizer.

    Order of calls: construct the engine, build the model inside ``loading()``, call ``attach``.
    Then, for each step: ``backward`` once per micro-batch, ``layer_shards`` to edit shards in
    place, and ``step`` or ``discard_step``.

    Attributes:
        dtype: dtype of the stored weights.
        gradient_dtype: dtype in which gradients are summed over micro-batches and kept.
        keeps_whole_weights: whether each rank keeps the full weights. They are best read straight
            to its device.
        loads_on_rank_0: whether only rank 0 reads the model's files. The other ranks build the
            model on "meta".
        model: the model itself; set by ``attach``, as are all attributes below.
        module: the module to call for a forward.
        optimizer: the AdamW optimizer, whose param_groups hold the learning rate.
        shards: finds this rank's part of each parameter.
        adapted: {name: layer that the method adapts}, in model order.
    """

    world: World
    dtype: torch.dtype
    gradient_dtype = torch.float32
    keeps_whole_weights = False
    loads_on_rank_0 = False
    model: nn.Module
    module: nn.Module
    optimizer: torch.optim.Optimizer
    shards: ParameterShards
    adapted: Mapping[str, nn.Module]

    @abstractmethod
    def loading(self) -> AbstractContextManager[None]:
        """Inside it, ``from_pretrained`` builds the model as the engine needs it, e.g. sharded."""

    @abstractmethod
    def attach(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        make_optimizer: MakeOptimizer,
    ) -> None:
        """Shard ``model`` and make the optimizer for the parameters that require a gradient.

        Args:
            model: the model, built inside ``loading()``.
            layers: {name: layer that the method adapts}, in model order.
            make_optimizer: makes the optimizer from {name: trained parameter}.
        """

    def shape_of(self, p: Tensor) -> torch.Size:
        """A parameter's full shape, also if the engine sharded it. Valid before ``attach``."""
        return p.shape

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradients. They are SUMMED over micro-batches and ranks.

        Args:
            loss: this micro-batch's share of the step's loss on this rank, a scalar.
            last: whether this is the last micro-batch of the gradient accumulation. If it is, the
                gradients are reduced when this returns, and ``layer_shards`` shows them.
        """

    @abstractmethod
    def step(self) -> None:
        """Clip the gradients, step the optimizer and drop the gradients."""

    @abstractmethod
    def discard_step(self) -> None:
        """Drop the gradients on all ranks. No parameter and no optimizer state changes.

        In fp16 the loss scale is lowered.
        """

    def release(self) -> None:  # noqa: B027 (most engines leave nothing gathered)
        """Free the weights that a forward or a backward outside a step left gathered.

        Gathered weights would not show later writes to their shards.
        """

    @property
    @abstractmethod
    def loss_scale(self) -> float:
        """The factor by which the stored gradients are too large: fp16's loss scale, else 1."""

    def layer_shards(self, *, gradients: bool = True) -> list[LayerShards]:
        """This rank's shards of the layers with factors A and B, in model order.

        Args:
            gradients: False between steps, when there are no gradients. ``grad_A`` and ``grad_B``
                are then the masters.
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

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """{name: trained parameter}, in model order, as the engine keeps them after ``attach``."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def gradients(self) -> list[FlatShard]:
        """The reduced gradients of all trained parameters, as in ``trained_shards``."""
        find = self.shards
        return [find.master(p).like(find.gradient(p).view(-1)) for p in self.trained.values()]

    def trained_shards(self, *, gradients: bool = True) -> list[TrainedShard]:
        """This rank's shards of all trained parameters, in model order.

        Args:
            gradients: as for ``layer_shards``.
        """
        return [self._trained(name, p, gradients) for name, p in self.trained.items()]

    def _trained(self, name: str, p: nn.Parameter, gradients: bool) -> TrainedShard:
        master = self.shards.master(p)
        local = self.shards.gradient(p).view(-1) if gradients else master.local
        moments = tuple(master.like(moment) for moment in self.shards.moments(p))
        return TrainedShard(name, master, master.like(local), moments)

    def base_shards(self) -> Iterator[NamedShard]:
        """This rank's shards of the loaded model's parameters, each once, in model order."""
        added = {id(p) for layer in self.adapted.values() for p in own_parameters(layer).values()}
        loaded: dict[int, str] = {}  # names before PEFT wrapped the layer, by parameter id
        for name, layer in self.adapted.items():
            linear = adapted_linear(layer)
            loaded |= {id(linear.weight): f"{name}.weight", id(linear.bias): f"{name}.bias"}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in added:
                yield self._named(loaded.get(id(parameter), name), parameter)

    def added_shards(self) -> Iterator[NamedShard]:
        """This rank's shards of the parameters that the method added, trained or not.

        In model order.
        """
        for name, layer in self.adapted.items():
            for key, parameter in own_parameters(layer).items():
                yield self._named(f"{name}.{key}", parameter)

    def _named(self, name: str, p: nn.Parameter) -> NamedShard:
        shard = self.shards.master(p) if p.requires_grad else self.shards.weight(p)
        return NamedShard(name, self.shape_of(p), shard)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write to shards inside it, between steps. After it, the forward reads the new values."""
        with torch.no_grad():
            yield
        self.order_writes()

    def order_writes(self) -> None:  # noqa: B027 (most engines read weights on one stream)
        """Make the device's next reads of weights wait for all writes so far.

        Called after writes between steps, and by ``step`` after its own and a transform's. Writes
        are on the current stream. An engine that reads weights on another stream makes that one
        wait. The host does not wait.
        """

    def state(self) -> dict[str, Any]:
        """State for a checkpoint besides shards: a few numbers, the same on every rank."""
        states = [self.optimizer.state.get(tensor) for tensor in self.shards.stepped()]
        return {"optimizer_steps": next((int(state["step"]) for state in states if state), 0)}

    @contextmanager
    def restoring(self, state: Mapping[str, Any]) -> Iterator[None]:
        """Restore ``state``. Inside it, copy a checkpoint into the engine's shards.

        The shards' moments exist inside it, unless the optimizer had not stepped yet.
        """
        if steps := state["optimizer_steps"]:
            for tensor in self.shards.stepped():
                self.optimizer.state[tensor] = {
                    "step": torch.tensor(float(steps)),
                    **{key: torch.zeros_like(tensor) for key in MOMENTS},
                }
        with self.writing():
            yield
