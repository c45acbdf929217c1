"""What one rank knows of the whole job: the rows of its node, and the newest board."""

from __future__ import annotations

import sys

from scalora_dist.distributed.board import Board, Silence
from scalora_dist.distributed.node_beats import Node, Row


class View:
    """The ranks of this node by their rows, and the others by the board.

    Attributes:
        node: this rank's node.
        board: the newest board.
        board_beat: this rank's heartbeat at which it came.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self.board = Board()
        self.board_beat = 0

    def look(self, beat: int) -> None:
        """Read the node's memory, at this rank's heartbeat number ``beat``."""
        self.node.look(beat)
        if (text := self.node.memory.read_board()) is None:
            return
        board = Board.decode(text)
        if board.age > self.board.age:
            self.board = board
            self.board_beat = beat

    @property
    def closed(self) -> set[int]:
        here = {rank for rank, row in self.node.rows.items() if row.closed}
        return here | self.board.closed

    @property
    def said(self) -> bool:
        """Whether a rank has printed why the job ends."""
        return self.board.said or any(row.said for row in self.node.rows.values())

    @property
    def asks(self) -> int | None:
        """The lowest living rank in which a collective failed, or that ends the job."""
        rows = self.node.rows.items()
        here = [r for r, row in rows if row.asks and not row.closed and self.node.beats(r)]
        board = [] if self.board.asks is None else [self.board.asks]
        return min(here + board, default=None)

    @property
    def store_cut(self) -> bool:
        """Whether the store's machine or process is gone, not in order, so that no board comes."""
        return self.node.rows.get(self.node.leader, Row()).cut and 0 not in self.closed

    def silent(self, most: int = sys.maxsize) -> dict[int, Silence]:
        """{rank: its silence}, of ranks that have not closed.

        Args:
            most: heartbeats that a rank of another node can have missed.
        """
        here = self.node.rows
        silent = {
            rank: silence._replace(missed=min(silence.missed, most))
            for rank, silence in self.board.silent.items()
            if rank not in here
        }
        for rank, row in here.items():
            if rank != self.node.rank:
                silent[rank] = Silence.of(row, self.node.missed(rank))
        closed = self.closed
        return {rank: silence for rank, silence in silent.items() if rank not in closed}
