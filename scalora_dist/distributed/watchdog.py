"""Ends the job when a rank has died or hangs, and reports which rank and where."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from typing import NoReturn

import torch.distributed as dist

from scalora_dist.distributed.board import Board, Silence, names
from scalora_dist.distributed.leader import Leader, register
from scalora_dist.distributed.node_beats import Row, join_node
from scalora_dist.distributed.places import LONGEST, place_of
from scalora_dist.distributed.store_line import StoreLine, addresses
from scalora_dist.distributed.world import World

BEAT = 1.0  # seconds between two heartbeats
SILENCE = 30.0  # seconds without a heartbeat that are possible for a busy, living rank
FEW = 4  # missed heartbeats of a dead rank, once a collective has failed
PATIENCE = 5.0  # seconds that other ranks wait for the one that prints the message
SHORT = 0.02  # seconds between two exchanges while the rank ends


class Watchdog:
    """Exchanges every rank's heartbeats and phases, by two threads of each rank.

    The ranks of a node share memory. One of them, the leader, exchanges the node's rows over the
    store for the board, on which one judge tells all ranks which are silent or hang.

    Time is counted in heartbeats of this process. So clocks of machines are never compared, and a
    job that was suspended and resumed is not taken for a hung one.
    """

    def __init__(self, world: World, timeout: float = 600.0) -> None:
        """Start watching, on all ranks at about the same time. A single rank isn't watched.

        Args:
            world: the ranks to watch.
            timeout: seconds that a main thread may stay in one phase.
        """
        self.world = world
        self.timeout = timeout
        self._beat = 0  # heartbeats so far
        self._progress = 0  # heartbeat at which the main thread last began a phase or a pause
        self._mine = Row()
        self._said = False
        self._board = Board()
        self._board_beat = 0  # heartbeat at which a new board last came
        self._published = False  # whether the judge can know that this rank has closed
        self._main = threading.get_ident()
        self._lock = threading.Lock()  # of the node's rows and the line; no one waits in it
        self._line: StoreLine | None = None
        self._due = threading.Event()
        self._ends = threading.Event()
        self._stop = threading.Event()
        self._ending = threading.Lock()
        self._threads: list[threading.Thread] = []
        if world.size == 1:
            return
        self._store = dist.PrefixStore(f"watch/{world.new_name()}", world.store)
        self._node = join_node(self._store, world.rank, world.local_rank, world.size, SILENCE)
        if self._node.number == world.rank:
            register(self._store, self._node.number)
        # All that may ask a slow name server is done here, on ranks that do not lead yet too.
        self._addresses = addresses(world.store)
        self._leader: Leader | None = self._new_leader()
        for work in (self._exchange, self._watch):
            self._threads.append(threading.Thread(target=work, daemon=True))
            self._threads[-1].start()
        atexit.register(self._halt)  # no thread may use the store when the interpreter exits

    def at(self, phase: str) -> None:
        """Begin ``phase`` of the main thread. The next call of at() or pause() ends it."""
        self._progress = self._beat
        phases = self._mine.phases + 1
        self._mine = Row(since=self._beat, phase=phase[:LONGEST], phases=phases, paused=False)

    def pause(self, *, idle: bool = False) -> None:
        """Set no time limit for the main thread until the next at().

        Args:
            idle: whether it only waits until then, as for a save. Then a dead rank is named as soon
                as in a phase. Else a rank may be so busy that it misses heartbeats.
        """
        self._progress = self._beat
        phases = self._mine.phases + 1
        self._mine = self._mine._replace(phases=phases, paused=True, idle=idle)
        if idle and self._threads:
            self._write()  # the rank may die before its next heartbeat

    def blame(self) -> str | None:
        """After a failed collective: says which rank has died and where it last was.

        None if all ranks are alive; it takes a few heartbeats to know this.
        """
        for _ in range(2 * FEW * 4 if self._threads else 0):
            if gone := self._gone(FEW, FEW):
                return gone
            time.sleep(BEAT / 4)
            self._look()
        return None

    def end(self, sentence: str) -> NoReturn:
        """Print why the job ends, on the lowest living rank, and exit with status 1.

        The other ranks print only if no rank has printed in the meantime.
        """
        self._ending.acquire()  # never released: the main thread and a watcher may both call end()
        who = ""
        if self._lower_answers():
            deadline = time.monotonic() + PATIENCE  # launchers kill all ranks as soon as one exits
            while not self._has_said() and time.monotonic() < deadline:
                time.sleep(BEAT / 2)
                self._look()
                self._due.set()
            who = f"rank {self.world.rank}: "  # still running, so no other rank saw this
        if not self._has_said():
            # Not by sys.stderr or sys.stdout: a hung main thread may hold their locks.
            os.write(2, f"error: {who}{sentence}: ending the job\n".encode())
            threading.Thread(target=sys.stdout.flush, daemon=True).start()
            self._said = True
            if self._threads:
                self._write()
            self._ends.set()
            self._due.set()
            time.sleep(3 * BEAT)  # the store may end with this process: let the others read _said
        os._exit(1)

    def close(self) -> None:
        """Stop watching this rank, which has ended without an error. Not for use after an error."""
        self._ends.set()
        self._due.set()
        if self._threads and not self._stop.is_set():
            self._mine = self._mine._replace(closed=True)
            self._write()
            deadline = time.monotonic() + 3 * BEAT
            while not self._may_leave() and time.monotonic() < deadline:
                time.sleep(SHORT)
                self._look()
        self._halt()

    def _may_leave(self) -> bool:
        """Whether the other ranks know, or will know without this one, that it has closed."""
        if len(self._closed()) == self.world.size:
            return True
        # The store may end with rank 0, so rank 0 waits until all ranks have closed.
        return not self.world.is_main and (self._published or not self._leads())

    def _halt(self) -> None:
        self._stop.set()
        self._due.set()
        for thread in self._threads:
            thread.join(BEAT)
        if self._threads and not any(thread.is_alive() for thread in self._threads):
            self._threads = []
            self._node.memory.close()
            self._connect(None)
            atexit.unregister(self._halt)

    def _watch(self) -> None:
        """Run the thread that beats and that ends the process. Nothing in it could block it."""
        while not self._stop.wait(BEAT):
            self._beat += 1
            self._write()
            self._due.set()
            if self._has_said():
                self.end("")
            patience = self.timeout / BEAT
            verdict = self._gone(min(patience, SILENCE / BEAT), patience) or self._board.hang
            if verdict:
                self.end(f"{verdict} (--hang_timeout {self.timeout:g})")

    def _write(self) -> None:
        """Write this rank's row to the node's memory, and read the others'."""
        mine = self._mine
        # Only when a hang is likely: CPython 3.11 crashes if a thread starts while stacks are read,
        # as torch's threads do.
        if not mine.paused and self._beat - mine.since > self.timeout / BEAT / 2:
            place, waits = place_of(self._main)
            mine = mine._replace(place=place, waits=waits)
        with self._lock:
            cut = self._line is not None and self._line.cut
            self._node.write(mine._replace(beat=self._beat, said=self._said, cut=cut))
        self._look()

    def _look(self) -> None:
        """Read the node's memory."""
        with self._lock:
            self._node.look(self._beat)
            if (text := self._node.memory.read_board()) is None:
                return
        board = Board.decode(text)
        if board.age > self._board.age:
            self._board, self._board_beat = board, self._beat

    def _exchange(self) -> None:
        """Run the thread that uses the store, if this rank leads. The store may block it."""
        beat = 0
        while not self._stop.is_set():
            if self._leads():
                beats, beat = min(1, self._beat - beat), self._beat
                try:
                    self._lead(beats)
                except (RuntimeError, OSError):  # the other thread counts how long this lasts
                    self._leader = None
                if self._line is None or self._line.cut:
                    self._connect(StoreLine(self._addresses))
            else:
                self._connect(None)
            self._due.wait(SHORT if self._ends.is_set() else 2 * BEAT)
            self._due.clear()

    def _lead(self, beats: int) -> None:
        """Exchange the node's rows for the board."""
        if self._leader is None:
            if self._line is not None and self._line.cut:
                raise ConnectionError("the store does not answer")
            self._leader = self._new_leader()
        self._look()
        rows = self._node.rows
        board = self._leader.exchange({r: (self._node.missed(r), rows[r]) for r in rows}, beats)
        self._node.memory.write_board(board.encode())
        self._published = rows[self.world.rank].closed

    def _new_leader(self) -> Leader:
        # A separate connection: the main thread blocks the other one while it waits. torch's type
        # of a store leaves `clone` out.
        store = self._store.clone()  # type: ignore[attr-defined]
        limit = self.timeout / BEAT
        return Leader(store, self._node.number, self.world.rank, self.world.size, limit)

    def _connect(self, line: StoreLine | None) -> None:
        with self._lock:
            if self._line is not None:
                self._line.close()
            self._line = line

    def _leads(self) -> bool:
        return self._node.leader == self.world.rank

    def _closed(self) -> set[int]:
        here = {rank for rank, row in self._node.rows.items() if row.closed}
        return here | self._board.closed

    def _has_said(self) -> bool:
        rows = self._node.rows.values() if self._threads else []
        return self._board.said or any(row.said for row in rows)

    def _silent(self) -> dict[int, Silence]:
        """{rank: its silence}: this node's ranks by their rows, the others by the board."""
        here = self._node.rows
        silent = {rank: s for rank, s in self._board.silent.items() if rank not in here}
        for rank, row in here.items():
            if rank != self.world.rank:
                silent[rank] = Silence.of(row, self._node.missed(rank))
        closed = self._closed()
        return {rank: silence for rank, silence in silent.items() if rank not in closed}

    def _lower_answers(self) -> bool:
        """Whether a lower rank lives, which prints the message then."""
        if not self._threads:
            return False
        away = self._closed() | {r for r, s in self._silent().items() if s.missed >= FEW}
        if self._store_gone(FEW) and not self._node.beats(0):
            away.add(0)
        return any(rank not in away for rank in range(self.world.rank))

    def _gone(self, beats: float, beats_paused: float) -> str | None:
        """Says which ranks missed ``beats`` heartbeats (``beats_paused`` if busy), or None."""
        mine = self._mine
        gone = {
            rank: silence
            for rank, silence in self._silent().items()
            if silence.missed >= (beats_paused if silence.busy else beats)
        }
        name = names(gone)
        if not gone and self._store_gone(beats_paused if Silence.of(mine, 0).busy else beats):
            gone = {0: Silence.of(mine, self._beat - self._board_beat)}
            name = "the launcher's store" if self._node.beats(0) else "rank 0"
        if not gone:
            return None
        # Their last rows are some heartbeats old, but this rank could not pass a step without them.
        latest = [Silence.of(mine, 0), *gone.values()]
        where = max(latest, key=lambda silence: silence.phases).where
        heard = max(silence.missed for silence in gone.values()) * BEAT
        return f"{name} stopped answering {where}; last heard {heard:.0f} s ago"

    def _store_gone(self, beats: float) -> bool:
        """Whether no board came for ``beats`` heartbeats, and not only because the store is slow.

        The store is on rank 0's node. A main thread that goes on to the next phase has heard of all
        ranks. A store that is only slow keeps its connection. It may be so for the time-out.
        """
        if 0 in self._closed():  # it may have taken the store along
            return False
        silence = self._beat - max(self._board_beat, self._progress)
        leader = self._node.rows.get(self._node.leader, Row())
        return silence >= (beats if leader.cut else max(beats, self.timeout / BEAT))
