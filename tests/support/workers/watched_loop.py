"""One rank of the runs in tests/distributed/test_watchdog.py."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist

from scalora_dist.distributed import watchdog as watch
from scalora_dist.distributed.watchdog import Watchdog
from scalora_dist.distributed.world import World


def rank(
    number: int, size: int, node: int, environment: dict[str, str], stderr: Path, what: str
) -> None:
    """The main function of one rank's process.

    Args:
        number: the rank.
        size: world size.
        node: number of ranks of each node.
        environment: where the store is.
        stderr: file to which the process writes its messages.
        what: a key of ``RUNS``.
    """
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number % node),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **environment,
    }
    with stderr.open("w") as file:
        os.dup2(file.fileno(), 2)
    watch.BEAT, watch.SILENCE, watch.PATIENCE = 0.5, 4.0, 2.0
    RUNS[what](World.join(timeout=timedelta(seconds=120)))


def store(port: int) -> None:
    """The main function of a process that serves the store alone, as a launcher does."""
    served = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while served.port:
        time.sleep(60)


def steps(mishap: Callable[[World], None], world: World, timeout: float = 60) -> None:
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


def slow(world: World, timeout: float = 5) -> None:
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


def slow_store(world: World) -> None:
    """A healthy run whose store answers nothing for longer than a busy rank may."""
    watch.BEAT, watch.SILENCE = 0.1, 3.0
    guard = Watchdog(world)

    def steps_until(silent: bool) -> None:
        """Take steps until all ranks have had no board for 35 heartbeats, or have one again."""
        there = 0.0
        while there < world.size:
            guard.at("a step")
            time.sleep(watch.BEAT)
            silence = guard._beat - guard._view.board_beat
            there = world.sum(silence > 35 if silent else silence < 5)[0]

    time.sleep(watch.BEAT)
    steps_until(silent=False)
    send_to_store(world, signal.SIGSTOP)
    steps_until(silent=True)
    send_to_store(world, signal.SIGCONT)
    steps_until(silent=False)
    guard.close()


def stopped_store(world: World) -> None:
    """The ranks wait for the store, which does not answer any more."""
    guard = Watchdog(world, timeout=8)
    guard.at("step 1")
    time.sleep(2 * watch.BEAT)
    world.sum(1.0)
    guard.pause()
    send_to_store(world, signal.SIGSTOP)
    world.main_only(lambda: None)


def save(world: World) -> None:
    """All main threads wait for a save, in which rank 1 dies."""
    guard = Watchdog(world, timeout=60)
    guard.at("step 1")
    world.sum(1.0)
    guard.pause(idle=True)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)


def send_to_store(world: World, number: signal.Signals) -> None:
    if world.is_main:
        process = os.environ["STORE_PROCESS"]
        os.kill(int(process), number)
        states = {""}
        while number == signal.SIGSTOP and states != {"T"}:  # its threads stop one by one
            threads = Path(f"/proc/{process}/task").glob("*/stat")
            states = {thread.read_text().rpartition(")")[2].split()[0] for thread in threads}


RUNS: dict[str, Callable[[World], None]] = {
    "stop 0": partial(steps, suffer(signal.SIGSTOP, 0)),
    "stop 1": partial(steps, suffer(signal.SIGSTOP, 1)),
    "kill 0": partial(steps, suffer(signal.SIGKILL, 0)),
    "kill 1": partial(steps, suffer(signal.SIGKILL, 1)),
    "kill 2": partial(steps, suffer(signal.SIGKILL, 2)),
    "read": partial(steps, read, timeout=8),
    "deadlock": partial(steps, deadlock, timeout=8),
    "fail": partial(steps, fail),
    "save": save,
    "slow": slow,
    "slow store": slow_store,
    "stopped store": stopped_store,
}
