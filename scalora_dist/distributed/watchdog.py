"""Ends the job when a rank has died or hangs, and reports which rank and where."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from contextlib import suppress
from typing import NoReturn

import torch.distributed as dist

from scalora_dist.distributed.board import Silence, names
from scalora_dist.distributed.leader import Leader, register
from scalora_dist.distributed.node_beats import Row, join_node
from scalora_dist.distributed.places import place_of, short
from scalora_dist.distributed.store_line import StoreLine, addresses
from scalora_dist.distributed.view import View
from scalora_dist.distributed.world import World

BEAT = 1.0  # seconds between two heartbeats
SILENCE = 30.0  # seconds without a heartbeat that are possible for a busy, living rank
FEW = 5  # missed heartbeats of a dead rank, once a collective has failed; > LEADERLESS + 1
PATIENCE = 5.0  # seconds that other ranks wait for the one that prints the message
AGAIN = 10.0  # seconds between two attempts to find the store's addresses
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
        self._asks = False  # whether a collective failed here, or this rank ends
        self._said = False
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
        self._node = join_node(
            self._store, world.rank, world.local_rank, world.size, SILENCE, register
        )
        self._view = View(self._node)
        # All that may ask a slow name server is done here, on ranks that do not lead yet too.
        self._addresses = addresses(world.store)
        self._leader: Leader | None = None
        with suppress(RuntimeError):  # it is tried again
            self._leader = self._new_leader()
        works = [self._exchange, self._watch]
        works += [self._find_store] if self._addresses == [] else []
        for work in works:
            self._threads.append(threading.Thread(target=work, daemon=True))
            self._threads[-1].start()
        atexit.register(self._halt)  # no thread may use the store when the interpreter exits

    def at(self, phase: str) -> None:
        """Begin ``phase`` of the main thread. The next call of at() or pause() ends it."""
        self._progress = self._beat
        phases = self._mine.phases + 1
        self._mine = Row(since=self._beat, phase=short(phase), phases=phases, paused=False)

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

        None if all ranks are alive; it takes a few heartbeats to know this. Meanwhile all ranks ask
        the same, so that the lowest one prints the answer at once.
        """
        if not self._threads:
            return None
        self._ask(True)
        for _ in range(2 * FEW * 4):
            if gone := self._gone(FEW, FEW):
                return gone
            time.sleep(BEAT / 4)
            self._look()
        self._ask(False)
        return None

    def end(self, sentence: str) -> NoReturn:
        """Print why the job ends, on the lowest living rank, and exit with status 1.

        The other ranks print only if no rank has printed in the meantime: first the lowest of those
        that end, as launchers kill all ranks as soon as one exits.
        """
        self._ending.acquire()  # never released: the main thread and a watcher may both call end()
        watcher = threading.get_ident() != self._main
        if self._threads:
            self._ask(True)
        who = ""
        begun = time.monotonic()
        while not self._has_said() and time.monotonic() < begun + PATIENCE * self._turn():
            who = f"rank {self.world.rank}: "  # still running, so no other rank saw this
            time.sleep(BEAT)
            if watcher:
                self._tick()
            else:
                self._look()
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
        if len(self._view.closed) == self.world.size:
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
            self._tick()
            if self._ending.locked():  # the main thread ends the process
                continue
            if self._view.said:
                self.end("")
            if verdict := self._verdict():
                self.end(verdict)

    def _verdict(self) -> str | None:
        """Why the job must end, or None."""
        most = self._beat - self._progress
        if self._view.asks is not None and (gone := self._gone(FEW, FEW, most)):
            return gone
        patience = self.timeout / BEAT
        verdict = self._gone(min(patience, SILENCE / BEAT), patience, most) or self._view.board.hang
        return f"{verdict} (--hang_timeout {self.timeout:g})" if verdict else None

    def _tick(self) -> None:
        self._beat += 1
        self._write()
        self._due.set()

    def _ask(self, asks: bool) -> None:
        self._asks = asks
        self._write()
        self._due.set()

    def _write(self) -> None:
        """Write this rank's row to the node's memory, and read the others'."""
        mine = self._mine
        place, waits = mine.place, mine.waits
        # Only when a hang is likely: CPython 3.11 crashes if a thread starts while stacks are read,
        # as torch's threads do.
        if not mine.paused and self._beat - mine.since > self.timeout / BEAT / 2:
            place, waits = place_of(self._main)
        with self._lock:  # two threads write: the last row must be the newest
            cut = self._line is not None and self._line.cut
            mine = self._mine._replace(beat=self._beat, asks=self._asks, said=self._said, cut=cut)
            self._node.write(mine._replace(place=place, waits=waits))
        self._look()

    def _look(self) -> None:
        """Read the node's memory."""
        with self._lock:
            self._view.look(self._beat)

    def _exchange(self) -> None:
        """Run the thread that uses the store, if this rank leads. The store may block it."""
        beat = 0
        while not self._stop.is_set():
            try:
                if self._leads():
                    if self._addresses != [] and (self._line is None or self._line.cut):
                        self._connect(StoreLine(self._addresses or []))
                    beats = min(1, self._beat - beat)
                    beat = self._beat
                    self._lead(beats)
                else:
                    self._connect(None)
            except Exception:  # the other thread counts how long this lasts
                self._leader = None
            self._due.wait(SHORT if self._ends.is_set() else 2 * BEAT)
            self._due.clear()

    def _find_store(self) -> None:
        """Run the thread that looks for the store's addresses, if no name server answered."""
        while self._addresses == [] and not self._stop.wait(AGAIN):
            self._addresses = addresses(self.world.store)

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

    def _has_said(self) -> bool:
        return bool(self._threads) and self._view.said

    def _turn(self) -> int:
        """0: this rank prints why the job ends. 1: a lower rank lives. 2: that one ends too."""
        if not self._threads:
            return 0
        away = self._view.closed | {r for r, s in self._view.silent().items() if s.missed >= FEW}
        if self._store_gone(FEW) and not self._node.beats(0):
            away.add(0)
        lower = set(range(self.world.rank)) - away
        return bool(lower) + (self._view.asks in lower)

    def _gone(self, beats: float, beats_paused: float, most: int = sys.maxsize) -> str | None:
        """Says which ranks missed ``beats`` heartbeats (``beats_paused`` if busy), or None.

        Args:
            most: as in ``View.silent``. A main thread that goes from phase to phase has heard of
                all ranks, even if the board has not.
        """
        mine = self._mine
        last = FEW if self._view.store_cut else beats  # no later board will come
        gone = {}
        for rank, silence in self._view.silent(most).items():
            limit = beats if rank in self._node.rows else min(beats, last)
            if silence.missed >= (beats_paused if silence.busy else limit):
                gone[rank] = silence
        name = names(gone)
        if not gone and self._store_gone(beats_paused if Silence.of(mine, 0).busy else beats):
            gone = {0: Silence.of(mine, self._beat - self._view.board_beat)}
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
        if 0 in self._view.closed:  # it may have taken the store along
            return False
        silence = self._beat - max(self._view.board_beat, self._progress)
        return silence >= (beats if self._view.store_cut else max(beats, self.timeout / BEAT))
