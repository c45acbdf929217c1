"""What the ranks of ``test_world.py`` run."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from scalora_dist.checkpoint import storage
from scalora_dist.checkpoint.storage import Checkpoints
from scalora_dist.config.training import TrainArguments
from scalora_dist.distributed import world as world_module
from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError
from scalora_dist.training.saving import check_shared


def on_nodes(world: World, ranks_of_each: int) -> tuple[World, int]:
    """These ranks as if on several nodes; which node this one is on."""
    node, local_rank = divmod(world.rank, ranks_of_each)
    return replace(world, local_rank=local_rank, nodes=-(-world.size // ranks_of_each)), node


def cached(world: World, folder: Path, ranks_of_each: int, disks: int) -> tuple[bool, str]:
    """A slow work whose result is a file; (whether the file was there, what it says).

    Args:
        disks: 1, or as many as there are nodes.
    """
    world_module.POLL = timedelta(milliseconds=100)  # one work takes many waits
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
    """A mistake that some ranks would find, as each rank hears of it."""
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
    """What is said of nodes of one rank with an output_dir each."""
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
