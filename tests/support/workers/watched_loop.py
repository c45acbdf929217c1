"""One rank of the runs in tests/distributed/test_watchdog.py."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from scalora_dist.distributed import watchdog as watch
from scalora_dist.distributed.watchdog import Watchdog
from scalora_dist.distributed.world import World


def rank(number: int, size: int, port: int, stderr: Path, what: str, timeout: float) -> None:
    """The main function of one rank's process.

    Args:
        number: the rank.
        size: world size.
        port: port of rank 0's store.
        stderr: file to which the process writes its messages.
        what: "slow", or a key of ``MISHAPS``.
        timeout: the watchdog's timeout in seconds.
    """
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with stderr.open("w") as file:
        os.dup2(file.fileno(), 2)
    watch.BEAT, watch.SILENCE, watch.PATIENCE = 0.5, 4.0, 2.0
    world = World.join(timeout=timedelta(seconds=120))
    if what == "slow":
        slow(world, timeout)
    else:
        steps(world, timeout, MISHAPS[what])


def steps(world: World, timeout: float, mishap: Callable[[World], None]) -> None:
    """Steps with the mishap in the third, and then the trainer's reaction to the failure."""
    guard = Watchdog(world, timeout)
    try:
        for step in range(1, 1000):
            guard.at(f"step {step}")
            time.sleep(watch.BEAT)
            if step == 3:
                mishap(world)
            world.sum(1.0)
    except RuntimeError:
        if gone := guard.blame():
            guard.end(gone)
        raise


def suffer(signal_number: int, unlucky: int) -> Callable[[World], None]:
    def mishap(world: World) -> None:
        if world.rank == unlucky:
            os.kill(os.getpid(), signal_number)

    return mishap


def read(world: World) -> None:
    while world.rank == 1:
        time.sleep(1)


def deadlock(world: World) -> None:
    """Rank 1 waits for a message of rank 0, which waits for rank 1 in a sum."""
    if world.rank == 1:
        world.main_only(lambda: None)


def fail(world: World) -> None:
    """An exception on every rank. No rank has died."""
    raise RuntimeError("out of luck")


MISHAPS = {
    "stop 0": suffer(signal.SIGSTOP, 0),
    "stop 1": suffer(signal.SIGSTOP, 1),
    "kill 0": suffer(signal.SIGKILL, 0),
    "kill 1": suffer(signal.SIGKILL, 1),
    "read": read,
    "deadlock": deadlock,
    "fail": fail,
}


def slow(world: World, timeout: float) -> None:
    """A healthy run: many phases, one long pause, and ranks that leave one by one."""
    guard = Watchdog(world, timeout)
    for step in range(4):
        guard.at(f"step {step}")
        time.sleep(timeout / 3)
        world.sum(1.0)
    guard.pause()
    world.main_only(lambda: time.sleep(1.25 * timeout))
    guard.at("the end")
    world.sum(1.0)
    guard.pause()
    time.sleep(1.25 * timeout * world.rank)  # the store leaves with rank 0
    guard.close()
