"""Functions that merge into sharded carries on real ranks, for tests/methods/test_carry.py."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from scalora_dist.core.layout import full_tensor
from scalora_dist.core.split_precision import join_halves
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.layers.carry_linear import CarryLinear
from scalora_dist.methods.carry import Carry
from scalora_dist.methods.merger import Merger
from scalora_dist.profiling.clock import Clock
from tests.support.workers import shards as shard_work

SHAPES = [(31, 24), (13, 11), (7, 40)]  # of W; at 3 columns and 4 ranks rows are split
RANK, CARRIED, ROOM, SCALING = 3, 6, 7, 0.5


def merges(world: World, kind: str, dtype: torch.dtype, count: int) -> list[dict[str, Any]]:
    """Merge ``count`` times into carries that are sharded as ``kind``.

    The third merge is only into the first layer.

    Returns:
        For each merge, {layer: (used columns, full C Dᵀ, lost norm so far, expected C Dᵀ)}.
    """
    wholes = [_factors(i, shape) for i, shape in enumerate(SHAPES)]
    shapes = [
        shape
        for m, n in SHAPES
        for shape in ((m, RANK), (n, RANK), (m, CARRIED + ROOM), (n, CARRIED + ROOM))
    ]
    shards = iter(shard_work.my_shards(world, [torch.zeros(shape) for shape in shapes], kind))
    layers, modules = [], {}
    for i, (m, n) in enumerate(SHAPES):
        A, B, C, D = itertools.islice(shards, 4)
        C, D = (shard.like(shard.local.to(dtype)) for shard in (C, D))
        A.write_(wholes[i][0])
        B.write_(wholes[i][1])
        layers.append(LayerShards(f"{i}", SCALING, A, A, B, A, B, (), (), carry=(C, D)))
        modules[f"{i}"] = CarryLinear.put_on(nn.Linear(n, m), scaling=SCALING, dropout=0.0)
        modules[f"{i}"].used = 0
    carry = Carry(layers, modules, world, rank=CARRIED, limit=0.5)
    merger = Merger(layers, world, carry)
    right = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    seen = []
    for merge in range(count):
        weights = _weights(merge)
        which = [0] if merge == 2 else None
        merger(layers, weights, Clock(), which)
        for i in which or range(len(layers)):
            a, b = (factor.double() for factor in wholes[i])
            right[i] += a * weights[i] @ b.T
        seen.append({x.name: (*_look(carry, x), right[i].clone()) for i, x in enumerate(layers)})
        for i, (layer, whole) in enumerate(zip(layers, wholes, strict=True)):
            # Like an optimizer's step: change all factors a little.
            generator = torch.Generator().manual_seed(10 * merge + i)
            for factor, shard in zip(whole, (layer.A, layer.B), strict=True):
                factor += 0.3 * torch.randn(factor.shape, generator=generator)
                shard.write_(factor)
    return seen


def _factors(seed: int, shape: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, RANK, generator=generator) for size in shape]


def _weights(merge: int) -> Tensor:
    generator = torch.Generator().manual_seed(merge)
    return torch.randn(len(SHAPES), RANK, dtype=torch.float64, generator=generator)


def _look(carry: Carry, layer: LayerShards) -> tuple[int, Tensor, float]:
    assert layer.carry is not None
    wholes = []
    for key, shard in zip("CD", layer.carry, strict=True):
        low = carry.low_halves.get(f"{layer.name}.{key}")
        exact = shard if low is None else shard.like(join_halves(shard.local, low))
        wholes.append(full_tensor(exact).double())
    used = carry.modules[layer.name].used
    assert not any(whole[:, used:].any() for whole in wholes)
    return used, wholes[0] @ wholes[1].T, carry.lost[layer.name]
