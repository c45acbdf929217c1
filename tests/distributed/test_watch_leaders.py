"""The watch without threads and clocks: leaders stepped by hand, memory, the store's line."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any, cast

import pytest
import torch.distributed as dist

from scalora_dist.distributed.board import Board, Silence, hang_of, names
from scalora_dist.distributed.leader import Leader, register
from scalora_dist.distributed.node_beats import LEADERLESS, Memory, Node, Row, join_node
from scalora_dist.distributed.places import LONGEST, short
from scalora_dist.distributed.store_line import StoreLine, addresses
from scalora_dist.distributed.watchdog import FEW
from tests.support.ranks import forkserver, free_port
from tests.support.workers import watched_loop

LIMIT = 600


class CountingStore:
    """A store that counts calls and bytes, in both directions."""

    def __init__(self) -> None:
        self.inner = dist.HashStore()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            answer = getattr(self.inner, name)(*args)
            self.calls[name] += 1
            self.bytes += sum(len(x) for x in _texts([args, answer]))
            return answer

        return call


def _texts(value: Any) -> Iterator[str | bytes]:
    if isinstance(value, str | bytes):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


class Job:
    """Simulated nodes of eight ranks. Each has a leader, whose first rank's row it sends."""

    def __init__(self, nodes: int, each: int = 8) -> None:
        self.store = CountingStore()
        self.each = each
        self.beat = 0
        self.phases = 0
        self.leaders = {}
        store = cast(dist.Store, self.store)
        for node in range(0, nodes * each, each):
            join_node(store, node, 0, nodes * each, 1, register).memory.close()
            for _ in range(each - 1):  # what they ask of the store
                store.wait([f"memory/{node}"])
                store.get(f"memory/{node}")
            self.leaders[node] = Leader(store, node, node, nodes * each, LIMIT)
        self.boards: dict[int, Board] = {}

    def tick(self, **changes: Any) -> None:
        """One heartbeat of all ranks.

        Args:
            changes: {"r" and a rank: fields of its row that differ}.
        """
        self.beat += 1
        row = Row(self.beat, self.beat, f"step {self.beat}", self.beat, False)
        for node, leader in self.leaders.items():
            rows = {
                rank: row._replace(**changes.get(f"r{rank}", {}))
                for rank in range(node, node + self.each)
            }
            self.boards[node] = leader.exchange({r: (0, x) for r, x in rows.items()}, 1)


@pytest.mark.parametrize(("nodes", "each"), [(128, 8), (1024, 1)])
def test_a_thousand_ranks_ask_little_of_the_store(nodes: int, each: int) -> None:
    """Also where no two ranks share memory, as in a container each."""
    job = Job(nodes, each)
    assert sum(job.store.calls.values()) <= 4 * 1024
    assert job.store.bytes < 2**20
    for _ in range(10):
        job.tick()
    job.store.calls.clear()
    job.store.bytes = 0
    job.beat = 10**6
    for _ in range(10):
        job.tick()
    assert all(board.silent == {} for board in job.boards.values())
    per_beat = {name: count / 10 for name, count in job.store.calls.items()}
    # A write and a read of each leader; the judge's: the board, the nodes, their texts.
    assert per_beat == {"set": nodes + 1, "get": nodes + 1, "multi_get": 1}
    assert job.store.bytes / 10 < 500_000


def _missed(board: Board, beats: int) -> bool:
    """Whether ranks are silent, all for as many heartbeats as ``blame`` waits for."""
    return bool(board.silent) and all(s.missed >= beats for s in board.silent.values())


def test_dead_nodes_are_on_the_board_also_if_one_of_them_judged() -> None:
    for dead in ({8}, {0}, {0, 8, 16, 24}):
        job = Job(8)
        for _ in range(3):
            job.tick()
        for node in dead:
            del job.leaders[node]
        beats = 0
        while not _missed(job.boards[56], FEW):
            job.tick()
            beats += 1
        assert beats <= 7
        board = job.boards[56]
        assert set(board.silent) == {rank for node in dead for rank in range(node, node + 8)}
        assert {silence.where for silence in board.silent.values()} == {"in step 3"}
        assert board.term == (0 in dead) and board.judge not in dead


def test_living_ranks_of_a_dead_leader_are_not_named() -> None:
    """Its node is silent until another rank leads: not one of them is as old as the dead one."""
    assert FEW > LEADERLESS + 1
    job = Job(2)
    for _ in range(3):
        job.tick()
    judge, dead = job.leaders[0], job.leaders[8]
    rows = {rank: (1, Row(3, 3, "step 3", 3, False)) for rank in range(8, 16)}
    dead.exchange(rows, 1)  # its last text states that each has just missed a heartbeat
    heir = Leader(cast(dist.Store, job.store), 8, 9, 16, LIMIT)
    named: set[int] = set()
    for beat in range(1, 10):
        if beat > LEADERLESS + 2:
            heir.exchange({**rows, 8: (beat, rows[8][1])}, 1)
        board = judge.exchange({0: (0, Row(3 + beat))}, 1)
        named = {rank for rank, silence in board.silent.items() if silence.missed >= FEW} - set(
            range(8)
        )
        assert named <= {8}
    assert named == {8}


def test_a_judge_that_slept_does_not_take_its_place_back() -> None:
    job = Job(3)
    job.tick()
    asleep = job.leaders.pop(0)
    for _ in range(LEADERLESS + 1):
        job.tick()
    job.leaders[0] = asleep
    for _ in range(3):
        job.tick()
    assert {(board.term, board.judge) for board in job.boards.values()} == {(1, 8)}
    assert job.boards[8].silent == {}


def test_a_slow_store_makes_nobody_silent() -> None:
    """After 40 heartbeats without an answer the judge may read before the others write."""
    job = Job(2)
    job.tick()
    job.beat += 40
    judge, other = job.leaders[0], job.leaders.pop(8)
    job.tick()
    assert job.boards[0].silent == {}
    job.leaders = {0: judge, 8: other}
    job.tick()
    assert job.boards[0].silent == job.boards[8].silent == {}


def test_the_board_says_who_closed_spoke_and_hangs() -> None:
    job = Job(2)
    late = {"since": -LIMIT - 5, "phases": 0, "phase": "step 0", "place": "x.py:1 in f"}
    for _ in range(3):
        job.tick(r3={"closed": True}, r9={"said": True}, r10=late)
    board = job.boards[8]
    assert board.closed == {3} and board.said
    others = "ranks 0-2, 4-9, 11-15"
    hangs = f"rank 10 hangs in step 0 at x.py:1 in f while {others} wait"
    assert board.hang.startswith(hangs)


def test_a_board_as_text() -> None:
    dead = Silence(4, 9, "step 5", False, False)
    board = Board(
        term=2,
        judge=8,
        beat=7,
        silent={**dict.fromkeys((1, 2, 5), dead), 3: dead._replace(missed=9)},
        closed=frozenset({0, 6, 7}),
        said=True,
        hang="rank 9 hangs",
    )
    assert Board.decode(board.encode()) == board
    assert len(json.loads(board.encode())[3]) == 3, "ranks 1-2 share an entry"
    assert len(Board(silent=dict.fromkeys(range(1000), dead)).encode()) < 100


def _beat(address: str, beats: int) -> None:
    """A second rank of the node, in a process of its own."""
    node = Node(0, 1, Memory.open(address, 4))
    node.write(Row(beats, phase="step 2"))


def test_texts_fit_in_their_room() -> None:
    """Long and foreign phases, places that all differ, and a text that would not fit."""
    size = 64
    memory = Memory.create(size)
    phase, place = short("\U0001f600" * LONGEST), short("\x00é\udc80" * LONGEST)
    assert max(len(phase.encode()), len(place.encode())) <= LONGEST
    row = Row(10**9, 0, phase, 10**9, False, place=place)
    nodes = [Node(0, rank, memory) for rank in range(2)]
    for node in (nodes[1], nodes[0]):
        node.write(row)
    nodes[0].look(1)
    assert nodes[0].rows == {0: row, 1: row}
    places = {rank: row._replace(place=f"{place[:-4]}{rank}") for rank in range(size)}
    hang = hang_of(places, LIMIT)
    assert hang.count(" at ") == 8 and hang.endswith(", others elsewhere")
    silent = {rank: Silence(10**6 + rank, 10**9, phase, False, False) for rank in range(size)}
    board = Board(silent=silent, hang=hang)
    memory.write_board(board.encode())
    assert Board.decode(memory.read_board() or "") == board
    for write in (lambda text: memory.write_row(0, text), memory.write_board):
        with pytest.raises(ValueError, match="too few"):
            write("x" * 10**6)
    nodes[0].look(2)
    assert nodes[0].rows == {0: row, 1: row}
    memory.close()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
def test_ranks_of_a_node_see_each_other() -> None:
    memory = Memory.create(4)
    node = Node(0, 0, memory)
    for beats in (1, 2):
        other = forkserver().Process(target=_beat, args=(memory.address, beats))
        other.start()
        other.join()
        node.look(10 * beats)
    assert list(node.rows) == [0, 1] and node.rows[1] == Row(2, phase="step 2")
    node.look(20 + LEADERLESS)
    assert node.missed(1) == LEADERLESS and node.leader == 0 and not node.beats(1)
    memory.write_board("x" * 1000)
    assert memory.read_board() == "x" * 1000
    memory.close()


def test_a_rank_that_does_not_see_the_memory_leads_itself() -> None:
    store = dist.HashStore()
    store.set("memory/0", f"/proc/{os.getpid()}/fd/0 scalora-elsewhere")
    elsewhere = join_node(store, 1, 1, 4, 1, register)
    alone = join_node(store, 3, 1, 4, 0.01, register)  # its first rank does not come
    assert (elsewhere.number, alone.number) == (1, 3)
    assert elsewhere.leader == 1 and alone.leader == 3


@pytest.fixture
def served() -> Iterator[tuple[dist.Store, BaseProcess]]:
    port = free_port()
    process = forkserver().Process(target=watched_loop.store, args=(port,))
    process.start()
    yield dist.TCPStore("127.0.0.1", port, is_master=False), process
    process.kill()
    process.join()


def test_a_stopped_store_is_slow_and_a_dead_one_is_cut(
    served: tuple[dist.Store, BaseProcess],
) -> None:
    store, process = served
    line = StoreLine(addresses(dist.PrefixStore("x", store)) or [])
    os.kill(process.pid or 0, signal.SIGSTOP)
    assert not line.cut
    stopped = StoreLine(addresses(store) or [])
    assert not stopped.cut, "the kernel accepts for a busy process"
    process.kill()
    process.join()
    assert line.cut and stopped.cut and StoreLine(addresses(store) or []).cut
    for each in (line, stopped):
        each.close()


def test_names() -> None:
    assert names([3]) == "rank 3"
    assert names([0, 1, 2, 5]) == "ranks 0-2, 5"
