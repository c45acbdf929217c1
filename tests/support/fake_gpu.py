"""Walks through methods on a fake GPU: one rank of a group of any size, op by op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch

from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.methods.adamw_direction import adamw_direction
from scalora_dist.methods.carry import Carry
from scalora_dist.methods.lora_pro import LoraPro
from scalora_dist.methods.merger import IntoWeights, Merger
from scalora_dist.methods.rank_monitor import RankMonitor
from scalora_dist.methods.relora import ReloraRestart
from scalora_dist.methods.scalora import Rescaler
from scalora_dist.planning.ranges import Sharding
from scalora_dist.profiling.clock import Clock
from scalora_dist.profiling.kernels import Counts, KernelCount
from tools.fake_gpu.device import fake_gpu
from tools.fake_gpu.layers import (
    ShardsEngine,
    fake_layers,
    known_ranges,
)

RANK = 4
SHAPES = [(48, 32), (32, 32), (25, 32)]  # of one block; the last has no whole share on 8 ranks


def walk(
    method: str,
    sharding: Sharding,
    rank: int,
    size: int,
    *,
    blocks: int = 2,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    r: int = RANK,
    clock: Clock | None = None,
    dtype: torch.dtype = torch.bfloat16,
    moments: bool = True,
    offloads: bool = False,
    frozen_in: Literal["gpu", "pinned", "pageable"] = "gpu",
) -> Counts:
    """What one rank's GPU does in one run of a method's work, set-up excluded.

    Args:
        method: one of ``WALKS``.
        sharding: how the engine shards.
        rank: this rank.
        size: world size.
        blocks: number of blocks, each with a layer of each of ``shapes``.
        shapes: (m, n) of each layer of a block.
        r: rank of A and B.
        clock: its ``begin`` is called inside the work.
        dtype: of W and the carry.
        moments: whether AdamW has stepped before.
        offloads: whether factors, gradients and moments are in the host's memory.
        frozen_in: the memory of W and the carry: the GPU's, or the host's of either kind.
    """
    with fake_gpu(rank, size) as world, known_ranges(sharding):
        carry = 3 * r if method.startswith("carry") else 0
        layers = fake_layers(
            world,
            sharding,
            list(shapes) * blocks,
            rank=r,
            dtype=dtype,
            moments=moments,
            carry=carry,
            frozen_on=None if frozen_in == "gpu" else torch.device("cpu"),
            trained_on=torch.device("cpu") if offloads else None,
            pinned=frozen_in == "pinned",
        )
        engine = ShardsEngine(world, layers)
        work = WALKS[method](world, layers, engine)
        with KernelCount("cuda") as count:
            work(clock or Clock())
        return count.take()


def _rescaler(
    rule: str, world: World, layers: Sequence[LayerShards], engine: ShardsEngine
) -> Callable[[Clock], object]:
    merger = Merger(layers, world, IntoWeights(layers, "split"))
    if rule == "paper, monitored":
        merger.monitor = RankMonitor(layers, len(SHAPES), world, seed=0)
    rescaler = Rescaler(
        merger,
        rule=rule.partition(",")[0],
        eta_lipschitz=0.5,
        bounds=(0.05, 5.0),
        fp16=rule == "paper, fp16",
        direction=partial(adamw_direction, engine, max_grad_norm=1.0) if rule == "adamw" else None,
    )

    def work(clock: Clock) -> None:
        assert rescaler(layers, clock).applied

    return work


def _lora_pro(
    world: World, layers: Sequence[LayerShards], engine: ShardsEngine
) -> Callable[[Clock], object]:
    transform = LoraPro(engine)

    def work(clock: Clock) -> None:
        assert transform(layers, clock).applied

    return work


def _relora(
    world: World, layers: Sequence[LayerShards], engine: ShardsEngine
) -> Callable[[Clock], object]:
    merger = Merger(layers, world, IntoWeights(layers, "split"))
    restart = ReloraRestart(merger, interval=10, prune=0.9, seed=0)
    return lambda clock: restart(engine, 10, clock)


def _carry(
    used: int, world: World, layers: Sequence[LayerShards], engine: ShardsEngine
) -> Callable[[Clock], object]:
    modules: dict[str, Any] = {layer.name: SimpleNamespace(used=used) for layer in layers}
    carry = Carry(layers, modules, world, rank=RANK, limit=1.0)
    merger = Merger(layers, world, carry)
    weights = torch.ones(len(layers), RANK, dtype=torch.float64)

    def work(clock: Clock) -> None:
        merger(layers, weights, clock)
        assert bool(carry.report()) == bool(used)  # compressed where it was full

    return work


RULES = ("paper", "scalar", "nnls", "adamw", "paper, fp16")
WALKS: dict[str, Callable[..., Callable[[Clock], object]]] = {
    **{f"rescale, {rule}": partial(_rescaler, rule) for rule in (*RULES, "paper, monitored")},
    "lora-pro": _lora_pro,
    "relora": _relora,
    "carry": partial(_carry, 0),
    "carry, full": partial(_carry, 3 * RANK),
}
