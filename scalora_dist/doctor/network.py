"""Checks that the collectives of a run give right results, and measures how fast they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from scalora_dist.distributed.world import World
from scalora_dist.doctor.finding import Finding

ROUNDS = 5
MIB = 2**20
SIZE = {"cuda": 64 * MIB, "cpu": 4 * MIB}  # bytes of a large message
SLOW = {"cuda": 5e9, "cpu": 0.0}  # bytes/s below which a warning is given
# What is summed: gradients; grams and counts. What is sent: weights; 4-bit codes.
SUMMED = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
SENT = (*SUMMED, torch.uint8)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
NAMES |= {torch.float64: "fp64", torch.int64: "int64", torch.uint8: "uint8"}
Group = dist.ProcessGroup | None  # None: all ranks


@dataclass(frozen=True)
class Collective:
    """One kind of collective.

    Attributes:
        dtypes: those in which a run uses it.
        traffic: bytes that a rank sends per byte of the message, for n ranks.
        prepare: (this rank, number of ranks, the whole message, group) to (a call that gives the
            result, the exact result).
    """

    dtypes: tuple[torch.dtype, ...]
    traffic: Callable[[int], float]
    prepare: Callable[[int, int, Tensor, Group], tuple[Callable[[], Tensor], Tensor]]


# Of a sum, each entry of the message has one rank that adds it; the others add 0. So the sum is
# exact in every dtype and for any number of ranks.


def _all_reduce(
    rank: int, size: int, whole: Tensor, group: Group
) -> tuple[Callable[[], Tensor], Tensor]:
    message = _share(rank, size, whole)

    def call() -> Tensor:
        dist.all_reduce(message, group=group)
        return message

    return call, whole


def _reduce_scatter(
    rank: int, size: int, whole: Tensor, group: Group
) -> tuple[Callable[[], Tensor], Tensor]:
    message, mine = _share(rank, size, whole), whole.chunk(size)[rank]
    result = torch.empty_like(mine)

    def call() -> Tensor:
        dist.reduce_scatter_tensor(result, message, group=group)
        return result

    return call, mine


def _all_gather(
    rank: int, size: int, whole: Tensor, group: Group
) -> tuple[Callable[[], Tensor], Tensor]:
    mine, result = whole.chunk(size)[rank].clone(), torch.zeros_like(whole)

    def call() -> Tensor:
        dist.all_gather_into_tensor(result, mine, group=group)
        return result

    return call, whole


def _broadcast(
    rank: int, size: int, whole: Tensor, group: Group
) -> tuple[Callable[[], Tensor], Tensor]:
    message = whole.clone() if rank == 0 else torch.zeros_like(whole)

    def call() -> Tensor:
        dist.broadcast(message, src=0, group=group)
        return message

    return call, whole


def _share(rank: int, size: int, whole: Tensor) -> Tensor:
    """What one rank adds to the sum ``whole``."""
    adder = torch.arange(len(whole), device=whole.device) % size
    return torch.where(adder == rank, whole, torch.zeros_like(whole))


COLLECTIVES = {
    "all-reduce": Collective(SUMMED, lambda n: 2 * (n - 1) / n, _all_reduce),
    "all-gather": Collective(SENT, lambda n: (n - 1) / n, _all_gather),
    "reduce-scatter": Collective(SUMMED, lambda n: (n - 1) / n, _reduce_scatter),
    "broadcast": Collective(SENT, lambda n: 1.0, _broadcast),
}


def check_collective(world: World, name: str) -> Finding:
    """Whether it is right in each dtype, and how fast it is. A collective."""
    kind, size = COLLECTIVES[name], SIZE[world.device.type]
    for dtype in kind.dtypes:
        call, expected = _prepare(world, kind, size, dtype)
        wrong = not torch.equal(call(), expected)
        ranks = [r for r, each in enumerate(world.exchange(str(wrong))) if each == "True"]
        if ranks:
            return Finding(
                f"wrong in {NAMES[dtype]} on {len(ranks)} of {world.size} ranks, the first is "
                f"rank {ranks[0]}",
                "a device, a cable or a driver may be faulty: start the doctor on half of the "
                "nodes, and on the other half",
            )
    small = seconds(world, _prepare(world, kind, 4 * world.size, torch.float32)[0])
    large = seconds(world, _prepare(world, kind, size, torch.float32)[0])
    rate = kind.traffic(world.size) * size / large
    right = ", ".join(NAMES[dtype] for dtype in kind.dtypes)
    found = f"{right} right; {rate / 1e9:.2f} GB/s; {1e6 * small:.0f} µs for a small one"
    if rate < SLOW[world.device.type]:
        return Finding(
            found,
            "slow: NCCL_DEBUG=INFO shows what NCCL takes; set NCCL_SOCKET_IFNAME or NCCL_IB_HCA",
            fatal=False,
        )
    return Finding(found)


def check_interconnect(world: World) -> Finding:
    """Rates of an all-reduce in each node, and between the nodes' first ranks. A collective."""
    answers = world.exchange(str(world.local_rank))
    firsts = [rank for rank, local_rank in enumerate(answers) if local_rank == "0"]
    ends = [*firsts[1:], world.size]
    nodes = [list(range(*span)) for span in zip(firsts, ends, strict=True)]
    found = []
    for where, groups in (("within a node", nodes), ("between nodes", [firsts])):
        if len(groups[0]) > 1 and len({*map(len, groups)}) == 1:
            rate = _rate(world, groups)
            found.append(f"{rate / 1e9:.2f} GB/s {where} ({len(groups[0])} ranks)")
    return Finding(f"all-reduce: {', '.join(found)}")


def _rate(world: World, groups: list[list[int]]) -> float:
    """Bytes/s of a rank in an all-reduce of every group at once; the slowest group counts."""
    made = [(ranks, dist.new_group(ranks)) for ranks in groups]  # all ranks make all groups
    mine = next(((ranks, group) for ranks, group in made if world.rank in ranks), None)
    kind, size = COLLECTIVES["all-reduce"], SIZE[world.device.type]
    call: Callable[[], object] = lambda: None  # noqa: E731
    if mine:
        ranks, group = mine
        call, _ = _prepare(world, kind, size, torch.float32, ranks, group)
    slowest = seconds(world, call)
    if mine:
        dist.destroy_process_group(mine[1])
    return kind.traffic(len(groups[0])) * size / slowest


def _prepare(
    world: World,
    kind: Collective,
    size: int,
    dtype: torch.dtype,
    ranks: list[int] | None = None,
    group: Group = None,
) -> tuple[Callable[[], Tensor], Tensor]:
    """A collective on a message of ``size`` bytes, a little less if the ranks do not divide it."""
    ranks = ranks or list(range(world.size))
    count = max(1, size // dtype.itemsize // len(ranks)) * len(ranks)
    whole = (1 + torch.arange(count, device=world.device) % 7).to(dtype)
    return kind.prepare(ranks.index(world.rank), len(ranks), whole, group)


def seconds(world: World, call: Callable[[], object]) -> float:
    """The slowest rank's fastest round."""
    best = float("inf")
    for _ in range(ROUNDS):
        world.sum(0.0)  # all start together
        begun = time.perf_counter()
        call()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return world.max(best)[0]
