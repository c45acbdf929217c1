"""One rank's layers of a large run on a fake GPU: shards as an engine shows them to a method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.layout import Layout
from scalora_dist.distributed.world import World
from scalora_dist.engines.base import Engine
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.layers.carry_linear import CarryLinear
from scalora_dist.planning.ranges import Sharding, ranges_of

FLAT: tuple[Sharding, ...] = ("zero1", "zero3")  # DeepSpeed steps one buffer


@contextmanager
def known_ranges(sharding: Sharding) -> Iterator[None]:
    """Inside it, ``Layout.of`` computes the ranges of all ranks instead of exchanging them.

    The other ranks of a fake group send nothing.
    """

    def of(shards: Sequence[FlatShard], device: torch.device | str = "cpu") -> Layout:
        (group,) = {shard.group for shard in shards}
        shapes = [shard.shape for shard in shards]
        size = 1 if group is None else dist.get_world_size(group)
        ranges = ranges_of("local" if group is None else sharding, shapes, size)
        mine = [[shard.offset, shard.offset + shard.local.numel()] for shard in shards]
        rank = 0 if group is None else dist.get_rank(group)
        assert ranges[rank].tolist() == mine, f"these shards are not those of {sharding}"
        return Layout(shapes, ranges.numpy(), group, torch.device(device), rank)

    with patch.object(Layout, "of", of):
        yield


def fake_layers(
    world: World,
    sharding: Sharding,
    shapes: Sequence[tuple[int, int]],
    *,
    rank: int,
    scaling: float = 2.0,
    dtype: torch.dtype = torch.bfloat16,
    moments: bool = True,
    carry: int = 0,
    frozen_on: torch.device | None = None,
    trained_on: torch.device | None = None,
    pinned: bool = False,
) -> list[LayerShards]:
    """This rank's shards of layers with weights (m, n). Called inside ``fake_gpu``.

    Args:
        world: the fake GPU's world.
        sharding: how the engine shards; see ``ranges_of``.
        shapes: (m, n) of each layer.
        rank: r.
        scaling: s.
        dtype: of W and of the carry.
        moments: whether AdamW's moments exist.
        carry: K, the columns of each carry; 0: no carry.
        frozen_on: device of W and of the carry; None: the world's.
        trained_on: device of factors, gradients and moments (offload); None: the world's.
        pinned: whether W and the carry are in pinned memory, on the CPU.
    """
    group = None if sharding == "local" else dist.group.WORLD
    weights = "local" if sharding == "zero1" else sharding  # ZeRO-1 shards what is trained

    def shards(
        matrices: Sequence[tuple[int, int]],
        kind: Sharding,
        dtype: torch.dtype,
        device: torch.device,
        *,
        flat: bool = False,
        pinned: bool = False,
    ) -> list[FlatShard]:
        ranges = ranges_of(kind, matrices, world.size)[world.rank].tolist()
        sizes = [high - low for low, high in ranges]
        if flat:
            locals_ = torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes)
        else:
            locals_ = tuple(
                torch.empty(n, dtype=dtype, device=device, pin_memory=pinned) for n in sizes
            )
        held = group if kind != "local" else None
        return [
            FlatShard(local, low, shape, held)
            for local, (low, _), shape in zip(locals_, ranges, matrices, strict=True)
        ]

    factors = [(rows, rank) for shape in shapes for rows in shape]
    trained = partial(shards, factors, sharding, torch.float32, trained_on or world.device)
    flat = sharding in FLAT
    masters, gradients = trained(flat=flat), trained()
    pairs: list[tuple[FlatShard, ...]] = [() for _ in factors]
    if moments:
        pairs = list(zip(trained(flat=flat), trained(flat=flat), strict=True))
    device = frozen_on or world.device
    frozen = shards(shapes, weights, dtype, device, pinned=pinned)
    columns = [(rows, carry) for shape in shapes for rows in shape]
    carries = shards(columns, weights, dtype, device, pinned=pinned) if carry else []
    return [
        LayerShards(
            name=f"layers.{i}",
            scaling=scaling,
            W=frozen[i],
            A=masters[2 * i],
            B=masters[2 * i + 1],
            grad_A=gradients[2 * i],
            grad_B=gradients[2 * i + 1],
            moments_A=pairs[2 * i],
            moments_B=pairs[2 * i + 1],
            carry=(carries[2 * i], carries[2 * i + 1]) if carry else None,
        )
        for i in range(len(shapes))
    ]


def _empty_carry() -> CarryLinear:
    """A layer's module without its parameters, with the number of columns that are filled."""
    module = CarryLinear.__new__(CarryLinear)
    nn.Module.__init__(module)
    module.used = 0
    return module


class ShardsEngine(Engine):
    """An engine that has nothing but the shards of ``fake_layers``: no model, no forward."""

    dtype = torch.bfloat16

    def __init__(self, world: World, layers: Sequence[LayerShards]) -> None:
        self.world = world
        self.layers = list(layers)
        self.adapted = {layer.name: _empty_carry() for layer in layers if layer.carry}
        group: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "lr": 1e-4, "params": []}
        self.optimizer: Any = SimpleNamespace(param_groups=[group], state={})

    def layer_shards(self, *, gradients: bool = True) -> list[LayerShards]:
        return self.layers

    def state(self) -> dict[str, Any]:
        return {"optimizer_steps": 1}

    @property
    def loss_scale(self) -> float:
        return 1.0

    def _no_model(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("these shards have no model")

    loading: Callable[..., AbstractContextManager[None]] = _no_model
    attach = backward = step = discard_step = _no_model
