"""Functions that ranks run in tests/distributed/test_world.py."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from scalora_dist.checkpoint import storage
from scalora_dist.checkpoint.storage import Checkpoints
from scalora_dist.config.training import TrainArguments
from scalora_dist.core import host
from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError
from scalora_dist.profiling.traffic import Traffic
from scalora_dist.training.saving import check_shared
from tests.support.host_reads import HostReads


def on_nodes(world: World, ranks_of_each: int) -> tuple[World, int]:
    """A World with these ranks on several simulated nodes, and this rank's node number."""
    node, local_rank = divmod(world.rank, ranks_of_each)
    return replace(world, local_rank=local_rank, nodes=-(-world.size // ranks_of_each)), node


def cached(world: World, folder: Path, ranks_of_each: int, disks: int) -> tuple[bool, str]:
    """Run slow work that writes a file. Returns (whether the file was there, its text).

    Args:
        folder: folder of the file.
        ranks_of_each: ranks of each node.
        disks: number of disks: 1, or one for each node.
    """
    world, node = on_nodes(world, ranks_of_each)
    file = folder / f"cache of disk {node % disks}"

    def work() -> tuple[bool, str]:
        there = file.exists()
        if not there:
            time.sleep(0.5)
            file.write_text(f"made by rank {world.rank}")
        return there, file.read_text()

    return world.node_first(work)


def refusal(world: World, ranks_of_each: int, wrong: set[int]) -> str:
    """The error message on each rank if the work fails on the ranks ``wrong``; "nothing": none."""
    world, _ = on_nodes(world, ranks_of_each)

    def work() -> None:
        if world.rank in wrong:
            raise UserError(f"seen by rank {world.rank}")

    try:
        world.node_first(work)
    except UserError as error:
        return str(error)
    return "nothing"


def output_dirs(world: World, folders: list[Path], save_steps: int) -> str:
    """The refusal if each node, with one rank, has its own output_dir; "nothing": none."""
    storage.NFS_SECONDS = 0.5
    world, node = on_nodes(world, 1)
    train = TrainArguments(output_dir=str(folders[node]), save_steps=save_steps)
    timeout = timedelta(seconds=60)
    checkpoints = Checkpoints(folders[node], world, keep=1, timeout=timeout)
    try:
        check_shared(checkpoints, train)
    except UserError as error:
        return str(error)
    finally:
        checkpoints.close()
    return "nothing"


def reductions(world: World) -> list[float]:
    return [*world.sum(world.rank, 1), *world.max(world.rank, -world.rank)]


def tables(world: World, count: int) -> tuple[Tensor, dict[str, int]]:
    """A table of ``count`` rows as this rank gets it, and the collectives that it took."""
    whole = torch.arange(2.0 * count, dtype=torch.float64).view(count, 2) / 3
    share = -(-count // world.size)
    mine = whole[world.rank * share : (world.rank + 1) * share]
    rows = torch.full((share, 2), torch.nan, dtype=torch.float64)  # padding, which nobody reads
    rows[: len(mine)] = mine
    with Traffic() as traffic:
        found = world.gather_table(rows, count)
    assert torch.equal(found, whole)
    return found, dict(traffic.collectives)


def mixed_reduction(world: World) -> tuple[list[float], list[str], int]:
    """Sums of numbers and tensors; what the host read besides; how often it waited."""
    rank = torch.tensor(world.rank)
    waits: list[int] = []
    plain = host.on_host

    def counted(work: Any, *tensors: Any) -> Any:
        waits.append(1)
        return plain(work, *tensors)

    with pytest.MonkeyPatch.context() as patch, HostReads() as reads:
        patch.setattr(host, "on_host", counted)
        found = world.sum(rank.double(), 0.5, rank > 1, True, rank.float() / 4)
    return found, reads.found, len(waits)


def connections(world: World) -> tuple[int, int]:
    """Number of this process's TCP connections before and after more collectives."""

    def count() -> int:
        found = psutil.Process().net_connections("tcp")
        return sum(each.status == psutil.CONN_ESTABLISHED for each in found)

    before = count()
    for _ in range(3):
        world.sum(1.0)
        world.gather_rows(torch.ones(2, 2))
        world.from_rank_0(torch.ones(3))
    world.exchange("")  # nobody leaves before all have counted
    after = count()
    world.exchange("")
    return before, after
