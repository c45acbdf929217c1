"""Ranks that die, stop or hang, for real: what the others say, and that they leave."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scalora_dist.distributed.watchdog import Watchdog
from scalora_dist.distributed.world import World
from tests.support.ranks import forkserver, free_port
from tests.support.workers import watched_loop


class Run:
    """The processes of one run, which do what ``watched_loop`` knows by this name."""

    def __init__(self, folder: Path, what: str, size: int, node: int, store: bool) -> None:
        """
        Args:
            size: number of ranks.
            node: number of ranks of each node.
            store: whether a process of its own serves the store, as under torchrun.
        """
        context = forkserver()
        port = free_port()
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.files = [folder / f"{what} {size} {rank}" for rank in range(size)]
        self.store = context.Process(target=watched_loop.store, args=(port,))
        if store:
            self.store.start()
            environment["STORE_PROCESS"] = str(self.store.pid)
            environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            environment["TORCHELASTIC_RESTART_COUNT"] = "0"
        self.ranks = []
        for rank, file in enumerate(self.files):
            args = (rank, size, node, environment, file, what)
            file.touch()
            self.ranks.append(context.Process(target=watched_loop.rank, args=args))
            self.ranks[-1].start()

    def errors(self, rank: int, status: int) -> list[str]:
        """A rank's error messages, once it has left with this status."""
        self.ranks[rank].join(120)
        text = self.files[rank].read_text()
        assert self.ranks[rank].exitcode == status, text
        return re.findall("^error: (.*)", text, re.MULTILINE)

    def kill(self) -> None:
        for process in [*self.ranks, self.store]:
            if process.pid:
                process.kill()
                process.join()


# (what it does, ranks, ranks of each node, whether the store is a process of its own)
RUNS = {
    "stop 0": ("stop 0", 2, 2, False),
    "stop 1": ("stop 1", 2, 2, False),
    "stop 1 of two nodes": ("stop 1", 4, 1, False),
    "kill 0": ("kill 0", 3, 3, False),
    "kill 1": ("kill 1", 3, 3, False),
    "kill the first node": ("kill 0", 2, 1, False),
    "kill the judge": ("kill 0", 4, 2, True),
    "kill a leader": ("kill 2", 4, 2, True),
    "read": ("read", 3, 2, False),
    "deadlock": ("deadlock", 2, 1, False),
    "fail": ("fail", 2, 2, False),
    "save": ("save", 3, 2, False),
    "slow": ("slow", 2, 2, False),
    "slow store": ("slow store", 2, 1, True),
    "stopped store": ("stopped store", 2, 2, True),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """All runs, started together: they mostly wait."""
    folder = tmp_path_factory.mktemp("runs")
    started = {name: Run(folder, *args) for name, args in RUNS.items()}
    yield started
    for run in started.values():
        run.kill()


STOPPED = r"rank {} stopped answering in step 3; last heard \d+ s ago"


@pytest.mark.parametrize(
    ("run", "unlucky", "witness"),
    [("stop 0", 0, 1), ("stop 1", 1, 0), ("stop 1 of two nodes", 1, 0)],
)
def test_a_stopped_rank(runs: dict[str, Run], run: str, unlucky: int, witness: int) -> None:
    """Rank 0 takes the store with it: the other one waits for an answer, and that for ever."""
    (message,) = runs[run].errors(witness, 1)
    pattern = STOPPED.format(unlucky) + r" \(--hang_timeout 60\): ending the job"
    assert re.fullmatch(pattern, message)


@pytest.mark.parametrize(
    ("run", "unlucky"),
    [
        ("kill 0", 0),
        ("kill 1", 1),
        ("kill the first node", 0),
        ("kill the judge", 0),
        ("kill a leader", 2),
    ],
)
def test_a_killed_rank(runs: dict[str, Run], run: str, unlucky: int) -> None:
    """A collective fails, and the trainer asks who is to blame."""
    dead, *others = sorted(range(len(runs[run].ranks)), key=lambda rank: rank != unlucky)
    (message,) = runs[run].errors(others[0], 1)
    assert re.fullmatch(STOPPED.format(unlucky) + ": ending the job", message)
    assert runs[run].errors(dead, -signal.SIGKILL) == []
    for other in others[1:]:
        assert runs[run].errors(other, 1) == []


def test_a_rank_that_dies_while_the_others_wait_for_a_save(runs: dict[str, Run]) -> None:
    """It is named as soon as in a step, and not after the time of a pause."""
    (message,) = runs["save"].errors(0, 1)
    died = re.fullmatch(
        r"rank 1 stopped answering after step 1; last heard (\d+) s ago"
        r" \(--hang_timeout 60\): ending the job",
        message,
    )
    assert died and 4 <= int(died[1]) <= 20
    assert runs["save"].errors(2, 1) == []


def test_a_hung_rank(runs: dict[str, Run]) -> None:
    run = runs["read"]
    (message,) = run.errors(0, 1)
    assert re.fullmatch(
        r"rank 1 hangs in step 3 at watched_loop\.py:\d+ in read"
        r" while ranks 0, 2 wait at world\.py:\d+ in _reduce"
        r" \(--hang_timeout 8\): ending the job",
        message,
    )
    assert run.errors(1, 1) == run.errors(2, 1) == []


def test_ranks_that_wait_for_each_other(runs: dict[str, Run]) -> None:
    run = runs["deadlock"]
    (message,) = run.errors(0, 1)
    places = r"rank 0 at world\.py:\d+ in _reduce, rank 1 at world\.py:\d+ in _while_others_wait "
    assert re.match("ranks 0-1 hang in step 3, " + places, message)
    assert run.errors(1, 1) == []


def test_a_failure_is_nobodys_death(runs: dict[str, Run]) -> None:
    for rank in range(2):
        assert runs["fail"].errors(rank, 1) == []
        assert "RuntimeError: out of luck" in runs["fail"].files[rank].read_text()


@pytest.mark.parametrize("run", ["slow", "slow store"])
def test_a_slow_run_and_a_slow_store_are_nobodys_death(runs: dict[str, Run], run: str) -> None:
    for rank in range(2):
        assert runs[run].errors(rank, 0) == []


def test_a_store_that_holds_up_the_ranks_for_the_time_out(runs: dict[str, Run]) -> None:
    (message,) = runs["stopped store"].errors(0, 1)
    pattern = r"the launcher's store stopped answering after step 1; last heard (8|9|1\d) s ago.*"
    assert re.fullmatch(pattern, message)
    assert runs["stopped store"].errors(1, 1) == []


def test_a_single_rank_is_not_watched() -> None:
    watch = Watchdog(World(0, 1, 0, torch.device("cpu"), dist.HashStore()))
    watch.at("step 1")
    watch.pause()
    assert watch.blame() is None
    watch.close()
