"""Counts what a rank's GPU does in a rescale and in an optimizer step, on a fake GPU.

The work itself runs, op by op, on shards as the engine lays them out. So the counts are those of
the code, also for a group of a thousand ranks. They do not include what DeepSpeed does around the
optimizer's step (its own sums, casts and copies).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from scalora_dist.config.options import Options
from scalora_dist.engines.layer_shards import LayerShards, factor_shards, gradient_shards
from scalora_dist.methods.merger import Merger
from scalora_dist.methods.registry import METHODS
from scalora_dist.methods.runner import merge_target
from scalora_dist.planning.ranges import Sharding
from scalora_dist.profiling.clock import Clock
from scalora_dist.profiling.kernels import Counts, KernelCount
from tools.fake_gpu.device import fake_gpu
from tools.fake_gpu.layers import (
    FLAT,
    ShardsEngine,
    fake_layers,
    known_ranges,
)


def sharding_of(options: Options) -> Sharding:
    """How the engine of a run shards. A hybrid mesh is taken to shard over all ranks."""
    if options.launch.fsdp:
        return "fsdp"
    path = options.launch.ds_config
    config = json.loads(Path(path).read_text()) if path else {}
    stage = int((config.get("zero_optimization") or {}).get("stage", 0))
    shardings: dict[int, Sharding] = {0: "local", 1: "zero1", 2: "zero1", 3: "zero3"}
    return shardings[stage]


def method_counts(
    options: Options, shapes: Sequence[tuple[int, int]], world: int
) -> dict[str, Counts]:
    """What one rescale (or restart) does on a middle rank, by part; {} for a method without one.

    Args:
        options: the resolved options of the run.
        shapes: (m, n) of each layer with factors A and B.
        world: world size.
    """
    method, args, train = METHODS[options.method.name], options.method, options.train
    if not shapes or not (method.transform or method.restart):
        return {}
    sharding, columns = sharding_of(options), 0
    if args.merge_target == "carry":
        assert args.carry_rank is not None and args.carry_room is not None
        columns = args.carry_rank + args.carry_room
    with fake_gpu(world // 2, world) as ranks, known_ranges(sharding):
        layers = fake_layers(
            ranks,
            sharding,
            shapes,
            rank=args.rank,
            dtype=train.dtype,
            carry=columns,
        )
        engine = ShardsEngine(ranks, layers)
        merger = None
        if method.merges:
            merger = Merger(layers, ranks, merge_target(engine, layers, args))
        transform = method.transform and method.transform(engine, merger, options)
        with KernelCount("cuda") as kernels:
            parts = _Parts(kernels)
            if transform:
                transform(layers, parts)
            elif method.restart and merger:
                method.restart(merger, args, train.seed)(engine, 1, parts)
            parts.begin("")
    return parts.counts


def optimizer_counts(options: Options, shapes: Sequence[tuple[int, int]], world: int) -> Counts:
    """What one step of AdamW does to the factors of a middle rank; arguments as before."""
    sharding = sharding_of(options)
    if not shapes:
        return Counts()
    with fake_gpu(world // 2, world) as ranks:
        layers = fake_layers(ranks, sharding, shapes, rank=options.method.rank)
        optimizer = torch.optim.AdamW(_stepped(sharding, layers))
        optimizer.step()  # makes the moments
        with KernelCount("cuda") as kernels:
            optimizer.step()
        return kernels.take()


def _stepped(sharding: Sharding, layers: Sequence[LayerShards]) -> list[nn.Parameter]:
    """The parameters that the optimizer sees: DeepSpeed's is one buffer."""
    masters = [shard.local for shard in factor_shards(layers)]
    gradients = [shard.local for shard in gradient_shards(layers)]
    if sharding in FLAT:
        masters, gradients = [torch.cat(masters)], [torch.cat(gradients)]
    parameters = [nn.Parameter(master) for master in masters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


class _Parts(Clock):
    """Sorts counts by the part of the work in which they were made.

    Attributes:
        counts: {part: its counts}.
    """

    def __init__(self, kernels: KernelCount) -> None:
        self.kernels = kernels
        self.counts: dict[str, Counts] = {}
        self.part = ""

    def begin(self, part: str) -> None:
        done = self.kernels.take()
        if self.part:
            self.counts[self.part] = self.counts.get(self.part, Counts()) + done
        self.part = part
