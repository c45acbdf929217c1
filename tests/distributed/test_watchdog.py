"""Ranks that die, stop or hang, for real: what the others say, and that they leave."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scalora_dist.distributed.board import names
from scalora_dist.distributed.watchdog import Watchdog
from scalora_dist.distributed.world import World
from tests.support.ranks import forkserver, free_port
from tests.support.workers import watched_loop


class Run:
    """The processes of one run, which do what ``watched_loop`` knows by this name."""

    def __init__(self, folder: Path, what: str, size: int, timeout: float) -> None:
        context = forkserver()
        port = free_port()
        self.files = [folder / f"{what} {rank}" for rank in range(size)]
        self.ranks = []
        for rank, file in enumerate(self.files):
            args = (rank, size, port, file, what, timeout)
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
        for process in self.ranks:
            process.kill()
            process.join()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """``start(what, size, timeout)``: a Run that doesn't outlive the test."""
    runs: list[Run] = []

    def start(what: str, size: int, timeout: float) -> Run:
        runs.append(Run(tmp_path, what, size, timeout))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


@pytest.fixture(scope="module", autouse=True)
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A healthy run of 16 s, most of them pauses: it goes on while the other tests wait."""
    run = Run(tmp_path_factory.mktemp("slow"), "slow", 2, timeout=4)
    yield run
    run.kill()


def test_a_stopped_rank(start: Callable[..., Run]) -> None:
    """Rank 0 takes the store with it: the other one waits for an answer, and that for ever."""
    for unlucky, run in [(rank, start(f"stop {rank}", 2, timeout=60)) for rank in (0, 1)]:
        (message,) = run.errors(1 - unlucky, 1)
        pattern = rf"rank {unlucky} stopped answering in step 3; last heard \d+ s ago "
        assert re.fullmatch(pattern + r"\(--hang_timeout 60\): ending the job", message)


def test_a_killed_rank(start: Callable[..., Run]) -> None:
    """A collective fails, and the trainer asks who is to blame."""
    for unlucky, run in [(rank, start(f"kill {rank}", 3, timeout=60)) for rank in (0, 1)]:
        pattern = rf"rank {unlucky} stopped answering in step 3; last heard \d+ s ago"
        (message,) = run.errors(1 if unlucky == 0 else 0, 1)
        assert re.fullmatch(pattern + ": ending the job", message)
        assert run.errors(unlucky, -signal.SIGKILL) == []
        for repeated in run.errors(2, 1):  # without the store it can't know that rank 1 spoke
            assert unlucky == 0
            assert re.fullmatch("rank 2: " + pattern + ": ending the job", repeated)


def test_a_hung_rank(start: Callable[..., Run]) -> None:
    run = start("read", 3, timeout=4)
    (message,) = run.errors(0, 1)
    assert re.fullmatch(
        r"rank 1 hangs in step 3 at watched_loop\.py:\d+ in read"
        r" while ranks 0, 2 wait at world\.py:\d+ in _reduce"
        r" \(--hang_timeout 4\): ending the job",
        message,
    )
    assert run.errors(1, 1) == run.errors(2, 1) == []


def test_ranks_that_wait_for_each_other(start: Callable[..., Run]) -> None:
    run = start("deadlock", 2, timeout=4)
    (message,) = run.errors(0, 1)
    places = r"rank 0 at world\.py:\d+ in _reduce, rank 1 at world\.py:\d+ in _while_others_wait "
    assert re.match("ranks 0-1 hang in step 3, " + places, message)
    assert run.errors(1, 1) == []


def test_a_slow_run_and_a_failure_are_nobodys_death(start: Callable[..., Run], slow: Run) -> None:
    failing = start("fail", 2, timeout=60)
    for rank in range(2):
        assert failing.errors(rank, 1) == []
        assert "RuntimeError: out of luck" in failing.files[rank].read_text()
        assert slow.errors(rank, 0) == []


def test_a_single_rank_is_not_watched() -> None:
    watch = Watchdog(World(0, 1, 0, torch.device("cpu"), dist.HashStore()))
    watch.at("step 1")
    watch.pause()
    assert watch.blame() is None
    watch.close()


def test_names() -> None:
    assert names([3]) == "rank 3"
    assert names([0, 1, 2, 5]) == "ranks 0-2, 5"
