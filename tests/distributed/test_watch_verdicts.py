"""What one rank concludes from its node's rows and the board: watchdogs in this process."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from scalora_dist.distributed import watchdog as watch
from scalora_dist.distributed.board import Board, Silence
from scalora_dist.distributed.watchdog import FEW, Watchdog
from scalora_dist.distributed.world import World

DEAD = Silence(FEW + 1, 1, "step 1", False, False)


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(watch.BEAT / 4)


class Pair:
    """Two watched ranks. Each is a node of its own. What they say is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watch, "BEAT", 0.05)
        monkeypatch.setattr(watch, "SILENCE", 12 * 0.05)
        self.said: list[tuple[int, str]] = []

        def end(guard: Watchdog, sentence: str) -> None:
            self.said.append((guard.world.rank, sentence))

        monkeypatch.setattr(Watchdog, "end", end)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.guards = [Watchdog(self._world(rank)) for rank in range(2)]

    def _world(self, rank: int) -> World:
        mine = dist.TCPStore("127.0.0.1", self.store.port, is_master=False)
        return World(rank, 2, 0, torch.device("cpu"), dist.PrefixStore("pair", mine))

    def stop(self) -> None:
        for guard in self.guards:
            guard._halt()


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    made = Pair(monkeypatch)
    yield made
    made.stop()


def test_a_node_that_does_not_reach_the_store_ends_no_job_whose_steps_go_on(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the steps stop too, it is dead."""
    watching, stalled = pair.guards
    for guard in pair.guards:
        guard.at("step 0")
        guard._write()
    boards = watching._view.board.beat
    _until(lambda: watching._view.board.beat > boards + 4)
    monkeypatch.setattr(stalled, "_leads", lambda: False)

    def missed() -> int:
        watching.at("a step")
        return watching._view.silent()[1].missed if watching._view.silent() else 0

    _until(lambda: missed() > 24)
    assert pair.said == []
    _until(lambda: bool(pair.said))
    rank, sentence = pair.said[0]
    assert rank == 0 and sentence.startswith("rank 1 stopped answering in a step; last heard ")


def test_all_ranks_ask_when_a_collective_failed_on_one(pair: Pair) -> None:
    """So rank 0, which still waits in a step, names the dead rank as soon as the other one."""
    asking, other = pair.guards
    asking._view.board = Board(term=9, silent={1: DEAD})
    asking.at("step 1")
    asking._beat += FEW + 1
    assert asking._verdict() is None, "a busy rank may be silent for longer"
    asking._ask(True)
    sentence = asking._verdict()
    assert sentence and "rank 1 stopped answering in step 1" in sentence
    other._view.board = Board()
    _until(lambda: other._view.asks == 0)


def test_after_the_store_is_cut_its_last_board_is_enough(pair: Pair) -> None:
    """The ranks that did not read why rank 0 left, which served the store."""
    guard = pair.guards[1]
    pair.stop()
    guard._view.board = Board(silent={0: DEAD})
    guard.at("step 1")
    guard._beat += FEW
    assert guard._verdict() is None
    guard._node.rows[1] = guard._node.rows[1]._replace(cut=True)
    sentence = guard._verdict()
    assert sentence and sentence.startswith("rank 0 stopped answering in step 1")
    guard._view.board = Board(silent={0: DEAD}, closed=frozenset({0}))
    assert guard._verdict() is None, "rank 0 has ended in order"


def test_a_closed_row_stays_closed(pair: Pair) -> None:
    """Also if the watcher was about to write when the main thread closed."""
    guard = pair.guards[1]
    pair.stop()

    class Late:
        """A lock that the watcher gets only after the main thread has closed."""

        def __init__(self, inner: threading.Lock) -> None:
            self.inner = inner

        def __enter__(self) -> None:
            guard._mine = guard._mine._replace(closed=True)
            self.inner.acquire()

        def __exit__(self, *_: Any) -> None:
            self.inner.release()

    guard._lock = Late(guard._lock)  # type: ignore[assignment]
    guard._node.memory = type(guard._node.memory).create(2)
    guard._write()
    assert guard._node.rows[1].closed


@pytest.mark.parametrize("refused", ["a name server", "memory"])
def test_a_refusal_at_the_start_ends_no_job(monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise socket.gaierror("no answer") if refused == "a name server" else PermissionError()

    with monkeypatch.context() as patch:
        if refused == "a name server":
            monkeypatch.setattr(watch, "AGAIN", 0.1)
            patch.setattr(socket, "getaddrinfo", refuse)
        else:
            patch.setattr(os, "memfd_create", refuse, raising=False)
        pair = Pair(monkeypatch)
        guard = pair.guards[1]
        _until(lambda: guard._view.board.beat > 4)
        cut = guard._view.store_cut
        assert not cut and guard._verdict() is None
    _until(lambda: guard._line is not None and not guard._line.cut)
    assert pair.said == []
    pair.stop()
