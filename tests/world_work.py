"""What the ranks of ``test_world.py`` run."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

from scalora_dist import world as world_module
from scalora_dist.errors import UserError
from scalora_dist.world import World


def cached(world: World, folder: Path) -> tuple[bool, str]:
    """A slow work whose result is a file; (whether the file was there, what it says)."""
    world_module.POLL = timedelta(milliseconds=100)  # rank 0 takes many waits

    def work() -> tuple[bool, str]:
        file = folder / "cache"
        there = file.exists()
        if not there:
            time.sleep(1)
            file.write_text("made")
        return there, file.read_text()

    return world.main_first(work)


def refusal(world: World) -> str:
    """Rank 0's mistake, as each rank hears of it."""

    def work() -> None:
        raise UserError(f"seen by rank {world.rank}")

    try:
        world.main_first(work)
    except UserError as error:
        return str(error)
    return "nothing"


def reductions(world: World) -> list[float]:
    return [*world.sum(world.rank, 1), *world.max(world.rank, -world.rank)]
