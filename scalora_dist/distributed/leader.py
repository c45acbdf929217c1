"""The leader of a node: exchanges its ranks' rows for the board, and may be the judge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from torch.distributed import Store

from scalora_dist.distributed.board import Board, Silence, hang_of
from scalora_dist.distributed.node_beats import LEADERLESS, Row

BOARD, NODES = "board", "nodes"


def register(store: Store, number: int) -> None:
    """Let the judge know a node, and leave what readers must not wait for."""
    store.set(f"node/{number}", json.dumps(["", {}]))
    store.append(NODES, f"{number} ")  # type: ignore[attr-defined]
    store.compare_set(BOARD, "", Board().encode())


class Leader:
    """Writes one text a heartbeat for its whole node, and reads the board.

    The first node's leader is the judge. It reads the nodes' texts, and writes the board. If the
    board stays the same for some heartbeats, the leaders choose another judge.
    """

    def __init__(self, store: Store, node: int, rank: int, size: int, limit: float) -> None:
        """
        Args:
            store: the watch's own names in the store of the ranks.
            node: number of the node.
            rank: this rank.
            size: number of ranks of the run.
            limit: number of heartbeats that a main thread may stay in one phase.
        """
        self.node = node
        self._store = store
        self._rank = rank
        self._size = size
        self._limit = limit
        self._exchanges = 0
        self._stale = 0
        self._board = Board()
        self._judge: _Judge | None = None

    def exchange(self, members: Mapping[int, tuple[int, Row]], beats: int) -> Board:
        """Write the node's text, and return the newest board.

        Args:
            members: {rank: (number of missed heartbeats, last row)} of the node's ranks.
            beats: number of heartbeats since the last exchange, at most 1. A store that was slow
                must not make the others look silent.

        Raises:
            RuntimeError: the connection to the store broke.
        """
        self._exchanges += 1
        rows = {rank: [missed, *row] for rank, (missed, row) in members.items()}
        stamp = f"{self._rank}/{self._exchanges}"
        self._store.set(f"node/{self.node}", json.dumps([stamp, rows], separators=(",", ":")))
        board = Board.decode(self._store.get(BOARD).decode())
        if board.age > self._board.age:
            self._board = board
            self._stale = 0
        else:
            self._stale += beats
        if self._board.judge != self.node and self._stale >= LEADERLESS:
            self._choose_judge()
        if self._board.judge != self.node:
            self._judge = None
            return self._board
        if self._judge is None:
            # A new judge gives all nodes the heartbeats that it waited for. Two more show which
            # of them live.
            missed = LEADERLESS - 1 if self._board.age > (0, 0) else 0
            self._judge = _Judge(self._store, self._size, missed)
        self._board = self._judge.judge(self._board, beats, self._limit)
        self._stale = 0
        self._store.set(BOARD, self._board.encode())
        return self._board

    def _choose_judge(self) -> None:
        """The first leader that asks for the next term has it."""
        term = self._board.term + 1
        judge = int(self._store.compare_set(f"judge/{term}", "", str(self.node)))
        self._board = replace(self._board, term=term, judge=judge)
        self._stale = 0


class _Judge:
    """Reads the texts of all nodes. Its clock counts its readings, not seconds."""

    def __init__(self, store: Store, size: int, missed: int) -> None:
        self._store = store
        self._first_missed = missed  # heartbeats of a node, when it is first seen
        self._rows = dict.fromkeys(range(size), Row())
        self._missed = dict.fromkeys(range(size), 0)
        self._texts: dict[str, bytes] = {}
        self._silence: dict[str, int] = {}  # readings since each node's text changed

    def judge(self, board: Board, beats: int, limit: float) -> Board:
        """Read all nodes' texts; the board that follows ``board``."""
        self._read(beats)
        rows = self._rows
        silent = {
            rank: Silence.of(rows[rank], missed)
            for rank, missed in self._missed.items()
            if missed >= LEADERLESS and not rows[rank].closed
        }
        asking = [
            rank
            for rank, row in rows.items()
            if row.asks and not row.closed and self._missed[rank] < LEADERLESS
        ]
        return replace(
            board,
            beat=board.beat + 1,
            silent=silent,
            closed=frozenset(rank for rank, row in rows.items() if row.closed),
            said=any(row.said for row in rows.values()),
            asks=min(asking, default=None),
            hang=hang_of(rows, limit),
        )

    def _read(self, beats: int) -> None:
        nodes = self._store.get(NODES).decode().split()
        missed = {rank: count + beats for rank, count in self._missed.items()}  # of unknown ranks
        for node, text in zip(
            nodes, self._store.multi_get([f"node/{node}" for node in nodes]), strict=True
        ):
            if node not in self._texts:
                self._silence[node] = self._first_missed
            elif text == self._texts[node]:
                self._silence[node] += beats
            else:
                self._silence[node] = 0
            self._texts[node] = text
            for rank, (stated, *row) in json.loads(text)[1].items():
                self._rows[int(rank)] = Row(*row)
                # Not the sum: while a node is without a leader, all its ranks would look older
                # than they are, and as old as the dead leader.
                missed[int(rank)] = max(stated, self._silence[node])
        self._missed = missed
