"""Checks that collectives of all ranks are right, and measures how fast they are."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from scalora_dist.distributed.world import World
from scalora_dist.doctor.finding import Finding

ROUNDS = 5
MIB = 2**20
SIZE = {"cuda": 256 * MIB, "cpu": 8 * MIB}  # bytes of one message
DTYPES = (torch.float32, torch.bfloat16, torch.int64)
SLOW = {"cuda": 5e9, "cpu": 0.0}  # bytes/s below which a warning is given


def check_collectives(world: World) -> list[Finding]:
    """An all-reduce, an all-gather and a reduce-scatter of each dtype. A collective.

    Every result is compared with its exact value: small integers, which each dtype can hold.
    """
    if world.size == 1:
        return [Finding("collectives", "one rank: none")]
    return [
        _check(world, "all-reduce", _all_reduce, share=2 * (world.size - 1) / world.size),
        _check(world, "all-gather", _all_gather, share=(world.size - 1) / world.size),
        _check(world, "reduce-scatter", _reduce_scatter, share=(world.size - 1) / world.size),
        _check_objects(world),
    ]


# Each runs one collective on a message of `count` numbers and returns (result, expected value).


def _all_reduce(world: World, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    message = torch.full((count,), world.rank + 1, dtype=dtype, device=world.device)
    dist.all_reduce(message)
    return message, torch.full_like(message, world.size * (world.size + 1) // 2)


def _all_gather(world: World, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mine = torch.full((count // world.size,), world.rank, dtype=dtype, device=world.device)
    everyone = mine.new_empty(len(mine) * world.size)
    dist.all_gather_into_tensor(everyone, mine)
    ranks = torch.arange(world.size, device=world.device).to(dtype)
    return everyone, ranks.repeat_interleave(len(mine))


def _reduce_scatter(world: World, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    part = count // world.size
    ranks = torch.arange(world.size, device=world.device).to(dtype)
    result = ranks.new_empty(part)
    dist.reduce_scatter_tensor(result, ranks.repeat_interleave(part))
    return result, torch.full_like(result, world.rank * world.size)


def _check(
    world: World,
    name: str,
    collective: Callable[[World, int, torch.dtype], tuple[Tensor, Tensor]],
    share: float,
) -> Finding:
    """Right in each dtype, and how fast: a small message's time, a large one's bytes/s.

    Args:
        share: the bytes that a rank receives, per byte of the message.
    """
    size = SIZE[world.device.type]
    for dtype in DTYPES:
        result, expected = collective(world, size // dtype.itemsize, dtype)
        wrong = float((result != expected).sum())
        ranks = world.sum(wrong > 0)[0]
        if ranks:
            return Finding(
                name,
                f"wrong in {str(dtype).removeprefix('torch.')} on {ranks:.0f} rank(s)",
                "a device, a cable or a driver is faulty: run again on half of the nodes to find "
                "which",
            )
    small = _seconds(world, lambda: collective(world, world.size, torch.float32))
    large = _seconds(world, lambda: collective(world, size // 4, torch.float32))
    rate = share * size / large
    found = (
        f"right; {size // MIB} MiB at {rate / 1e9:.2f} GB/s a rank, {1e6 * small:.0f} µs at least"
    )
    if rate < SLOW[world.device.type]:
        return Finding(
            name,
            found,
            "slow: NCCL_DEBUG=INFO shows what NCCL uses; set NCCL_SOCKET_IFNAME or NCCL_IB_HCA",
            fatal=False,
        )
    return Finding(name, found)


def _seconds(world: World, work: Callable[[], object]) -> float:
    """The slowest rank's fastest round."""
    best = float("inf")
    for _ in range(ROUNDS):
        world.sum(0.0)  # all start together
        begun = time.perf_counter()
        work()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return world.max(best)[0]


def _check_objects(world: World) -> Finding:
    """Over gloo, as checkpoints are written, on GPUs too."""
    group = dist.new_group(backend="gloo")
    everyone: list[int] = [0] * world.size
    dist.all_gather_object(everyone, world.rank, group=group)
    dist.destroy_process_group(group)
    if everyone == list(range(world.size)):
        return Finding("gloo", "right: checkpoints can be written")
    return Finding(
        "gloo",
        f"ranks {everyone}",
        "set GLOO_SOCKET_IFNAME to the interface that joins the nodes (docs/cluster.md)",
    )
