"""The heartbeats of the ranks of one node, in memory that they share."""

from __future__ import annotations

import json
import mmap
import os
import struct
import uuid
import zlib
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from torch.distributed import Store

MOST = 256  # ranks of a node; those beyond count as nodes of one rank
ROOM = 2048  # bytes of a rank's row
HEAD = struct.Struct("<II")  # length and checksum of a text
LEADERLESS = 3  # missed heartbeats of a leader or judge, after which another one takes over


class Row(NamedTuple):
    """State that a rank publishes. Time is counted in the rank's own heartbeats.

    Attributes:
        beat: number of heartbeats so far.
        since: heartbeat at which the phase began.
        phase: name of the main thread's phase.
        phases: number of phases and pauses so far; it is the same on all ranks.
        paused: whether the main thread has no time limit until the next phase.
        idle: whether it only waits meanwhile, so that nothing keeps the rank from its heartbeats.
        place: the main thread's line of code, once a phase has taken half of its time.
        waits: whether the main thread waits for other ranks there.
        closed: whether the rank has ended without an error.
        asks: whether a collective failed on the rank, or the rank ends the job.
        said: whether the rank has printed why the job ends.
        cut: whether the rank leads its node and has lost the connection to the store's machine.
    """

    beat: int = 0
    since: int = 0
    phase: str = "the start"
    phases: int = 0
    paused: bool = True
    idle: bool = False
    place: str = "an unknown place"
    waits: bool = False
    closed: bool = False
    asks: bool = False
    said: bool = False
    cut: bool = False


class Memory:
    """Texts that the processes of one machine share: a row of each rank, and the board.

    It is an anonymous file of Linux, which is in no folder: nothing is left of it after a kill.
    The others open it by the path that /proc gives its owner's file descriptor. A text has a
    checksum, so a reader never takes half of one.

    Attributes:
        address: what ``open`` takes in another process; "" if none can open it.
        rows: number of rows that it has room for.
    """

    def __init__(self, file: int | None, address: str, size: int) -> None:
        """
        Args:
            file: descriptor of the anonymous file; None: memory of this process alone.
            address: as the attribute.
            size: number of ranks of the run.
        """
        self.address = address
        self._file = file
        self.rows = min(size, MOST)
        self._board = self.rows * ROOM
        self._whole = self._board + 4 * ROOM + 512 * size  # a board may name each rank
        if file is not None:
            os.ftruncate(file, self._whole)
        self._map = mmap.mmap(-1 if file is None else file, self._whole)

    @classmethod
    def create(cls, size: int) -> Memory:
        """Empty memory for the ranks of a node, in a run of ``size`` ranks."""
        name = f"scalora-{uuid.uuid4().hex}"
        try:
            file = os.memfd_create(name)
        except (AttributeError, OSError):  # not Linux, or refused
            return cls(None, "", size)
        return cls(file, f"/proc/{os.getpid()}/fd/{file} {name}", size)

    @classmethod
    def open(cls, address: str, size: int) -> Memory:
        """The memory at another process's ``address``.

        Raises:
            OSError: this process does not see it: it is on another machine or in a container.
        """
        path, _, name = address.partition(" ")
        if str(Path(path).readlink()) != f"/memfd:{name} (deleted)":
            raise FileNotFoundError(address)
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), address, size)

    def write_row(self, number: int, text: str) -> None:
        self._write(number * ROOM, text, ROOM)

    def read_row(self, number: int) -> str | None:
        """A rank's text, or None: it has written none yet, or writes one now."""
        return self._read(number * ROOM)

    def write_board(self, text: str) -> None:
        self._write(self._board, text, self._whole - self._board)

    def read_board(self) -> str | None:
        return self._read(self._board)

    def close(self) -> None:
        self._map.close()
        if self._file is not None:
            os.close(self._file)

    def _write(self, start: int, text: str, room: int) -> None:
        data = text.encode()
        if HEAD.size + len(data) > room:
            raise ValueError(f"a text of {len(data)} bytes, for which {room} are too few")
        head = HEAD.pack(len(data), zlib.crc32(data))
        self._map[start : start + HEAD.size + len(data)] = head + data

    def _read(self, start: int) -> str | None:
        length, checksum = HEAD.unpack_from(self._map, start)
        data = self._map[start + HEAD.size : start + HEAD.size + length]
        return data.decode() if length and zlib.crc32(data) == checksum else None


class Node:
    """What one rank knows of the ranks of its node.

    Attributes:
        number: rank of the node's first rank. The ranks of a node are consecutive.
        rank: the rank that looks.
        memory: the memory that they share.
        rows: {rank: its last row}, of the ranks that have written one.
    """

    def __init__(self, number: int, rank: int, memory: Memory) -> None:
        self.number = number
        self.rank = rank
        self.memory = memory
        self.rows: dict[int, Row] = {}
        self._beat = 0
        self._moved: dict[int, int] = {}  # this rank's beat when each row's beat changed
        self.write(Row())
        self.look(0)

    def write(self, row: Row) -> None:
        self.memory.write_row(self.rank - self.number, json.dumps(row, ensure_ascii=False))

    def look(self, beat: int) -> None:
        """Read all rows, at this rank's heartbeat number ``beat``."""
        rows = dict(self.rows)
        for rank in range(self.number, self.number + self.memory.rows):
            text = self.memory.read_row(rank - self.number)
            if text is None:
                continue
            row = Row(*json.loads(text))
            if rank not in rows or row.beat != rows[rank].beat:
                self._moved[rank] = beat
            rows[rank] = row
        self._beat = beat
        self.rows = rows

    def missed(self, rank: int) -> int:
        """Number of heartbeats that a rank has missed."""
        return self._beat - self._moved[rank]

    @property
    def leader(self) -> int:
        """The lowest rank that beats and is not closed; the looking one if there is none."""
        living = (r for r, row in self.rows.items() if self.beats(r) and not row.closed)
        return min(living, default=self.rank)

    def beats(self, rank: int) -> bool:
        """Whether a rank is on this node, and beats."""
        return rank == self.rank or (rank in self.rows and self.missed(rank) < LEADERLESS)


def join_node(
    store: Store,
    rank: int,
    local_rank: int,
    size: int,
    patience: float,
    register: Callable[[Store, int], None],
) -> Node:
    """Share memory with the other ranks of this node. Called on all ranks at about the same time.

    The first rank makes the memory, and tells its address over the store. A rank that cannot open
    it, in a container of its own for example, counts as a node of one rank.

    Args:
        store: the watch's own names in the store of the ranks.
        rank: this rank.
        local_rank: this rank's number on its node.
        size: number of ranks of the run.
        patience: seconds to wait for the first rank.
        register: called with the store and the number of a new node, before a rank can join it:
            its first rank may die at once.
    """
    if 0 < local_rank < MOST:
        key = f"memory/{rank - local_rank}"
        with suppress(OSError, RuntimeError):  # it is not this machine's; the first has not come
            store.wait([key], timedelta(seconds=patience))
            memory = Memory.open(store.get(key).decode(), size)
            return Node(rank - local_rank, rank, memory)
    memory = Memory.create(size)
    node = Node(rank, rank, memory)  # with a row, so that this rank leads
    register(store, rank)
    store.set(f"memory/{rank}", memory.address)
    return node
