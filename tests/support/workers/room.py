"""Functions that ranks run in tests/methods/init/test_room.py."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import pytest

from scalora_dist.distributed.world import World
from scalora_dist.methods.init import initialization, room
from scalora_dist.methods.init.groups import Budget
from tests.support.workers import first_step


class Started(NamedTuple):
    """What an initialization has left.

    Attributes:
        added: {layer: {parameter that the method added: value}}.
        logged: the line about memory and passes.
    """

    added: dict[str, dict[str, np.ndarray]]
    logged: str


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def started(
    world: World, options: dict[str, Any], free: Budget | None = None, unit: int = 2**20
) -> Started:
    """Initialize a run.

    Args:
        free: what is taken to be free; None: what is.
        unit: bytes that stand for a MiB, for models of a few KiB.
    """
    lines, logger = Lines(), logging.getLogger(initialization.__name__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialization, "MIB", unit)
        if free is not None:
            patch.setattr(initialization, "free_room", lambda rehearse, world: free)
        before = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(lines)
        try:
            added, _ = first_step.start(world, options)
        finally:
            logger.removeHandler(lines)
            logger.setLevel(before)
    (line,) = lines.lines
    return Started(added, line)


def shared_out(world: World) -> Budget:
    """The room of a CPU rank. The last rank sees the least memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "available_bytes", lambda: 8000 - 2000 * world.rank)
        return room.free_room(lambda: pytest.fail("no rehearsal on a CPU"), world)
