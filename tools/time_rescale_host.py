"""Measures the milliseconds of Python that one rank spends in a rescale, at any number of ranks.

    python tools/time_rescale_host.py [--ranks 1024 --rank 8 --rounds 5]

A GPU works while the host runs ahead of it. What the host does between torch's operators decides
the speed where the GPU has less to do. This tool builds one rank's real shards of Gemma-3-12B's 336
projections on the CPU, in a group of any size, and runs the rescale by the rule adamw. It prints
the time outside of torch's operators, and the number of operators, for ZeRO-1, ZeRO-3 and FSDP2.

The other ranks do not exist: a collective leaves memory as it is. The solve gives α = β = 1. W is
not there: a merge is a call of Python that does nothing. On a GPU it is one operator, whose call
takes some 9 µs besides the driver's.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).parents[1]))

from scalora_dist.core.scale_solver import Scales
from scalora_dist.distributed.world import World
from scalora_dist.methods import merger as merging
from scalora_dist.methods import scalora
from scalora_dist.methods.adamw_direction import AdamWDirection
from scalora_dist.methods.merger import IntoWeights, Merger
from scalora_dist.methods.scalora import Rescaler
from scalora_dist.planning.ranges import Sharding
from scalora_dist.profiling.clock import Clock
from tools.fake_gpu.layers import fake_layers, known_ranges
from tools.gpu.gemma import projection_shapes, text_config

# Freed memory stays with the process, so that a measured Python function does not unmap it.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**36)}


@contextmanager
def alone(size: int) -> Iterator[World]:
    """The middle rank of a group of ``size`` ranks, of which the others do not exist."""
    rank = size // 2
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World(rank, size, 0, torch.device("cpu"), dist.HashStore())
    finally:
        dist.destroy_process_group()


def unmoved(gram_a: Tensor, gram_b: Tensor, **_: Any) -> Scales:
    ones = torch.ones(gram_a.shape[0], gram_a.shape[1] // 2, dtype=torch.float64)
    return Scales(ones, ones, torch.ones(len(ones), dtype=torch.int64))


def rescaler_of(world: World, sharding: Sharding, rank: int) -> tuple[Rescaler, list[Any]]:
    """A rescaler, and this rank's random shards of all of Gemma-3-12B's projections."""
    config = text_config(smoke=False)
    shapes = [*projection_shapes(config).values()] * config.num_hidden_layers
    with known_ranges(sharding):
        # No merge reads W, of which a rank under ZeRO-1 has more than this memory.
        nowhere = torch.device("meta")
        layers = fake_layers(world, sharding, shapes, rank=rank, frozen_on=nowhere)
        merger = Merger(layers, world, IntoWeights(layers, "split"))
    for layer in layers:
        for shard in (layer.A, layer.B, layer.grad_A, layer.grad_B):
            shard.local.normal_()
        for shard in (*layer.moments_A, *layer.moments_B):
            shard.local.uniform_()
    rescaler = Rescaler(
        merger,
        rule="adamw",
        eta_lipschitz=0.1,
        bounds=(0.05, 5.0),
        direction=partial(AdamWDirection, betas=(0.9, 0.999), epsilon=1e-8, step=2),
    )
    return rescaler, layers


def measure(sharding: Sharding, size: int, rank: int, rounds: int) -> dict[str, float]:
    """Medians over rounds, in ms: the whole rescale on a CPU, and its time outside of operators."""
    found = []
    with (
        alone(size) as world,
        patch.object(scalora, "solve", unmoved),
        patch.object(World, "gather_rows", lambda world, rows: rows.repeat(world.size, 1)),
        patch.object(merging, "add_low_rank_", lambda *_, **__: None),
    ):
        rescaler, layers = rescaler_of(world, sharding, rank)
        rescaler(layers, Clock())
        for _ in range(rounds):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                begun = time.perf_counter()
                assert rescaler(layers, Clock()).applied
                seconds = time.perf_counter() - begun
            outer = [event for event in profiler.events() if event.cpu_parent is None]
            inside = sum(event.time_range.elapsed_us() for event in outer) / 1e3
            found.append((1e3 * seconds, 1e3 * seconds - inside, len(outer)))
    whole, python, operators = (median(each) for each in zip(*found, strict=True))
    return {"whole": whole, "python": python, "operators": operators}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=8, help="r of A and B")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not os.environ.keys() >= KEEP_MEMORY.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    os.environ["KINETO_LOG_LEVEL"] = "6"
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    print(f"{args.ranks} ranks, r = {args.rank}: a rescale on one rank, without its merges")
    print(f"{'':<8}{'Python, ms':>12}{'operators':>12}{'in all on this CPU, ms':>26}")
    for sharding in ("zero1", "zero3", "fsdp"):
        found = measure(sharding, args.ranks, args.rank, args.rounds)
        print(
            f"{sharding:<8}{found['python']:>12.1f}{found['operators']:>12.0f}"
            f"{found['whole']:>26.1f}"
        )


if __name__ == "__main__":
    main()
