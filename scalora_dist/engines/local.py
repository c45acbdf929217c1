"""The engine for one process, with torch only: for laptops, debugging, and as the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scalora_dist.core import host
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.layout import global_norm
from scalora_dist.distributed.world import World
from scalora_dist.engines.base import MOMENTS, Engine, MakeOptimizer, ParameterShards
from scalora_dist.engines.layer_shards import as_matrix
from scalora_dist.layers.adapted_linear import adapted_linear


class LocalEngine(Engine):
    """A full model on one device. A and B are their own fp32 masters, for any dtype of W.

    Gradients are fp32 too. There is no loss scale, so float16 is not offered.
    """

    keeps_whole_weights = True

    def __init__(self, world: World, *, dtype: torch.dtype, max_grad_norm: float) -> None:
        """
        Args:
            dtype: dtype of the frozen weights, float32 or bfloat16.
            max_grad_norm: norm to which gradients are clipped; 0: no clipping.
        """
        self.world = world
        self.dtype = dtype
        self.max_grad_norm = max_grad_norm

    @contextmanager
    def loading(self) -> Iterator[None]:
        yield

    def attach(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        make_optimizer: MakeOptimizer,
    ) -> None:
        self.trains_weights = any(adapted_linear(x).weight.requires_grad for x in layers.values())
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.place(model)
        self.model = self.module = model
        self.adapted = layers
        self.optimizer = make_optimizer(
            {name: p for name, p in model.named_parameters() if p.requires_grad}
        )
        self.shards = self.make_shards()

    def place(self, model: nn.Module) -> None:
        """Move ``model`` to the device on which it is trained."""
        model.to(self.world.device)
        if self.trains_weights and self.dtype != torch.float32:
            # The weights are fp32 masters now, but the model still computes in 16 bits.
            cast = torch.autocast(self.world.device.type, self.dtype)
            model.forward = cast(model.forward)

    def make_shards(self) -> ParameterShards:
        return TorchShards(self.optimizer)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self) -> None:
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard_step(self) -> None:
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _clip(self) -> None:
        """Clip like torch's clip_grad_norm_, which cannot sum offloaded gradients over ranks."""
        if not self.max_grad_norm:
            return
        gradients = self.gradients()
        # Replicas of a hybrid mesh have the same sum up to rounding. All must clip by one number.
        norm = self.world.largest(global_norm(gradients, self.world.device))
        share = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1).float()
        held = [gradient.local for gradient in gradients if gradient.local.numel()]
        if held:  # they may be offloaded
            torch._foreach_mul_(held, host.to_device(share, held[0].device))

    @property
    def loss_scale(self) -> float:
        return 1.0


class TorchShards(ParameterShards):
    """Finds parameters, gradients and AdamW's moments where torch keeps them."""

    def shard(self, tensor: Tensor) -> FlatShard:
        """This rank's part of a parameter."""
        return FlatShard(self.local(tensor), 0, as_matrix(tensor.shape))

    def local(self, tensor: Tensor) -> Tensor:
        """A 1-D view of this rank's part of a parameter, gradient or moment."""
        return tensor.detach().view(-1)

    def weight(self, p: Tensor) -> FlatShard:
        return self.shard(p)

    def master(self, p: nn.Parameter) -> FlatShard:
        return self.shard(p)

    def gradient(self, p: nn.Parameter) -> Tensor:
        if p.grad is None:  # the forward did not reach p: its gradient is zero, its moments decay
            p.grad = torch.zeros_like(p)
        return self.local(p.grad)

    def moments(self, p: nn.Parameter) -> list[Tensor]:
        state: dict[str, Any] = self.optimizer.state.get(p, {})
        return [self.local(state[key]) for key in MOMENTS if key in state]
