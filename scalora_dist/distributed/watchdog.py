"""Ends the job when a rank has died or hangs, and reports which rank and where."""

from __future__ import annotations

import atexit
import faulthandler
import itertools
import json
import os
import re
import sys
import sysconfig
import threading
import time
from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from scalora_dist.distributed.world import World

BEAT = 1.0  # seconds between two heartbeats
SILENCE = 30.0  # seconds without a heartbeat that are possible for a busy, living rank
FEW = 4  # missed heartbeats of a dead rank, once a collective has failed
PATIENCE = 5.0  # seconds that other ranks wait for the one that prints the message

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("<frozen", sysconfig.get_paths()["stdlib"])
# Paths of code that waits for other ranks: in any frame of a stack (COLLECTIVES), or only in the
# innermost one (WAITS).
COLLECTIVES = (
    "-packages/deepspeed/comm/",
    "-packages/torch/distributed/distributed_c10d.py",
    "-packages/torch/distributed/_functional_collectives.py",
)
WAITS = (
    "-packages/deepspeed/",
    "-packages/torch/cuda/",  # for a GPU that waits
    "-packages/torch/distributed/",
    str(PACKAGE / "distributed" / "world.py"),
)


@dataclass(frozen=True)
class Row:
    """State that a rank publishes. Time is counted in the rank's own heartbeats.

    Attributes:
        beat: number of heartbeats so far.
        since: heartbeat at which the phase began.
        phase: name of the main thread's phase.
        count: number of phases and pauses so far; they are the same on all ranks.
        paused: whether the main thread has no time limit until the next phase.
        place: the main thread's line of code, once a phase has taken half of its time.
        waits: whether the main thread waits for other ranks there.
        closed: whether the rank has ended without an error.
        said: whether the rank has printed why the job ends.
    """

    beat: int = 0
    since: int = 0
    phase: str = "the start"
    count: int = 0
    paused: bool = True
    place: str = "an unknown place"
    waits: bool = False
    closed: bool = False
    said: bool = False

    @property
    def where(self) -> str:
        return f"{'after' if self.paused else 'in'} {self.phase}"


class Watchdog:
    """Exchanges every rank's heartbeats and phases over the store, by a thread of each rank.

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
        self._beat = self._heard = 0  # heartbeats so far; and at the last exchange
        self._mine = Row()
        self._said = False
        self._rows = [Row()] * world.size
        self._moved = [0] * world.size  # this rank's beat when each row's beat changed
        self._main = threading.get_ident()
        self._closing = threading.Event()
        self._stop = threading.Event()
        self._ending = threading.Lock()
        self._threads: list[threading.Thread] = []
        if world.size == 1:
            return
        # A separate connection: the main thread blocks the other one while it waits. torch's type
        # of a store leaves `clone` out, here and below.
        self._store = dist.PrefixStore("watch", world.store.clone())  # type: ignore[attr-defined]
        self._keys = [str(rank) for rank in range(world.size)]
        for key in self._keys:  # no reader must wait for a rank that never wrote
            self._store.compare_set(key, "", json.dumps(asdict(Row())))
        for work in (self._exchange, self._judge):
            self._threads.append(threading.Thread(target=work, daemon=True))
            self._threads[-1].start()
        atexit.register(self._halt)  # no thread may use the store when the interpreter exits

    def at(self, phase: str) -> None:
        """Begin ``phase`` of the main thread. The next call of at() or pause() ends it."""
        self._mine = Row(since=self._beat, phase=phase, count=self._mine.count + 1, paused=False)

    def pause(self) -> None:
        """Set no time limit for the main thread until the next at()."""
        self._mine = replace(self._mine, count=self._mine.count + 1, paused=True)

    def blame(self) -> str | None:
        """After a failed collective: says which rank has died and where it last was.

        None if all ranks are alive; it takes a few heartbeats to know this.
        """
        for _ in range(2 * FEW if self._threads else 0):
            if gone := self._gone(FEW, FEW):
                return gone
            time.sleep(BEAT)
        return None

    def end(self, sentence: str) -> NoReturn:
        """Print why the job ends, on the lowest living rank, and exit with status 1.

        The other ranks print only if no rank has printed in the meantime.
        """
        self._ending.acquire()  # never released: the main thread and a watcher may both call end()
        who, missed = "", self._silence()
        answers = [n < FEW and not row.closed for n, row in zip(missed, self._rows, strict=True)]
        if any(answers[: self.world.rank]):
            time.sleep(PATIENCE)  # launchers kill all ranks as soon as one exits
            who = f"rank {self.world.rank}: "  # still running, so no other rank saw this
        if not any(row.said for row in self._rows):
            # Not by sys.stderr or sys.stdout: a hung main thread may hold their locks.
            os.write(2, f"error: {who}{sentence}: ending the job\n".encode())
            threading.Thread(target=sys.stdout.flush, daemon=True).start()
            self._said = True
            time.sleep(3 * BEAT)  # the store may end with this process: let the others read _said
        os._exit(1)

    def close(self) -> None:
        """Stop watching this rank, which has ended without an error. Not for use after an error."""
        self._closing.set()
        deadline = time.monotonic() + 3 * BEAT
        # The store may end with rank 0, so rank 0 waits until all ranks have closed.
        ranks = range(self.world.size) if self.world.is_main else [self.world.rank]
        while self._threads and time.monotonic() < deadline:
            if all(self._rows[rank].closed for rank in ranks):
                break
            time.sleep(0.02)
        self._halt()

    def _halt(self) -> None:
        self._stop.set()
        self._closing.set()
        for thread in self._threads:
            thread.join(BEAT)

    def _exchange(self) -> None:
        """Run the thread that uses the store. The store may block it for ever."""
        while not self._stop.is_set():
            try:
                self._exchange_once()
            except RuntimeError:  # the other thread counts how long this lasts
                with suppress(RuntimeError):
                    self._store = self._store.clone()  # type: ignore[attr-defined]
            if self._closing.wait(BEAT):
                self._stop.wait(0.02)

    def _exchange_once(self) -> None:
        mine = self._mine
        # Only when a hang is likely: CPython 3.11 crashes if a thread starts while stacks are read,
        # as torch's threads do.
        if not mine.paused and self._beat - mine.since > self.timeout / BEAT / 2:
            place, waits = _place(self._main)
            mine = replace(mine, place=place, waits=waits)
        mine = replace(
            mine,
            beat=self._beat,
            closed=self._closing.is_set(),
            said=self._said,
        )
        self._store.set(self._keys[self.world.rank], json.dumps(asdict(mine)))
        rows = [Row(**json.loads(text)) for text in self._store.multi_get(self._keys)]
        self._heard = now = self._beat
        pairs = zip(rows, self._rows, self._moved, strict=True)
        self._moved = [now if new.beat != old.beat else last for new, old, last in pairs]
        self._rows = rows

    def _silence(self) -> list[int]:
        """Missed heartbeats of each rank. Rank 0's include a silent store, which is on its node."""
        return [self._beat - self._moved[0], *(self._heard - last for last in self._moved[1:])]

    def _judge(self) -> None:
        """Run the thread that ends the process. It does nothing that could block it."""
        while not self._stop.wait(BEAT):
            self._beat += 1
            if any(row.said for row in self._rows):
                self.end("")
            patience = self.timeout / BEAT
            verdict = self._gone(min(patience, SILENCE / BEAT), patience) or self._hung()
            if verdict:
                self.end(f"{verdict} (--hang_timeout {self.timeout:g})")

    def _gone(self, beats: float, beats_paused: float) -> str | None:
        """Says which ranks missed ``beats`` heartbeats (``beats_paused`` in a pause), or None."""
        rows, missed = self._rows, self._silence()
        allowed = [beats_paused if row.paused else beats for row in rows]
        gone = [r for r, row in enumerate(rows) if missed[r] >= allowed[r] and not row.closed]
        if not gone:
            return None
        name = _name(gone) if self.world.rank not in gone else "the launcher's store"
        # Their last rows are some heartbeats old, but this rank could not pass a step without them.
        where = max((self._mine, *(rows[r] for r in gone)), key=lambda row: row.count).where
        heard = max(missed[rank] for rank in gone) * BEAT
        return f"{name} stopped answering {where}; last heard {heard:.0f} s ago"

    def _hung(self) -> str | None:
        """Says which ranks make the others wait, or None: those last in phase that do not wait."""
        rows = {rank: row for rank, row in enumerate(self._rows) if not row.closed}
        last = min((row.count for row in rows.values()), default=0)
        late = {rank: row for rank, row in rows.items() if row.count == last}
        limit = self.timeout / BEAT
        if not late or any(r.paused or r.beat - r.since <= limit for r in late.values()):
            return None
        guilty = {rank: row for rank, row in late.items() if not row.waits} or late
        others = {rank: row for rank, row in rows.items() if rank not in guilty}
        phase = next(row.phase for row in guilty.values())
        sentence = f"{_verb(guilty, 'hang')} in {phase}{_places(guilty)}"
        return f"{sentence} while {_verb(others, 'wait')}{_places(others)}" if others else sentence


def _name(ranks: Collection[int]) -> str:
    """Ranks as text: ``rank 3`` or ``ranks 0-2, 5``."""
    runs = itertools.groupby(enumerate(sorted(ranks)), key=lambda pair: pair[1] - pair[0])
    spans = [[rank for _, rank in run] for _, run in runs]
    names = [f"{s[0]}-{s[-1]}" if len(s) > 1 else f"{s[0]}" for s in spans]
    return ("ranks " if len(ranks) > 1 else "rank ") + ", ".join(names)


def _verb(ranks: Collection[int], verb: str) -> str:
    return f"{_name(ranks)} {verb}{'s' * (len(ranks) == 1)}"


def _places(rows: dict[int, Row]) -> str:
    """Places of these ranks as text; ranks at the same place are grouped."""
    at = defaultdict(list)
    for rank, row in rows.items():
        at[row.place].append(rank)
    if len(at) == 1:
        return f" at {next(iter(at))}"
    return "".join(f", {_name(ranks)} at {place}" for place, ranks in at.items())


def _place(thread: int) -> tuple[str, bool]:
    """A thread's innermost line outside the libraries, and whether it waits for other ranks."""
    threads = _stacks()
    stack = threads.get(thread)
    if not stack:
        return "an unknown place", False
    stacks = [stack]
    if stack[0].function == "_engine_run_backward":  # on a GPU, hooks run in other threads
        stacks = list(threads.values())
    here = next((call for call in stack if not _in_library(call)), stack[0])
    name = f"{Path(here.file).name}:{here.line} in {here.function}"
    return name, any(map(_waits, stacks))


class _Call(NamedTuple):
    file: str
    line: str  # "??" where the interpreter does not know it
    function: str


def _stacks() -> dict[int, list[_Call]]:
    """{thread: its calls, innermost first}.

    Uses faulthandler, which makes no frame objects. Walking the frames of another, running thread
    (``sys._current_frames``) has crashed CPython 3.11.
    """
    in_memory = hasattr(os, "memfd_create")  # Linux; elsewhere a file, maybe on a full disk
    with open(os.memfd_create("stacks"), "w+b") if in_memory else TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read().decode(errors="replace")
    stacks: dict[int, list[_Call]] = {}
    calls: list[_Call] = []
    for line in text.splitlines():
        if head := re.match(r"(?:Current thread|Thread) 0x([0-9a-f]+)", line):
            calls = stacks[int(head[1], 16)] = []
        elif call := re.match(r'  File "(.*)", line (\S+) in (.*)', line):
            calls.append(_Call(*call.groups()))
    return {thread: calls for thread, calls in stacks.items() if calls}


def _in_library(call: _Call) -> bool:
    library = "-packages/" in call.file or call.file.startswith(LIBRARIES)
    return library and not call.file.startswith(str(PACKAGE))


def _waits(stack: list[_Call]) -> bool:
    files = [call.file for call in stack]
    return any(part in files[0] for part in WAITS) or any(
        part in file for part in COLLECTIVES for file in files
    )
