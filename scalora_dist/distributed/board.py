"""The board: what one judge publishes for all ranks about those that are silent, hang or end."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from scalora_dist.distributed.node_beats import Row

MOST_PLACES = 8  # that a message names


class Silence(NamedTuple):
    """A rank whose heartbeats are missing.

    Attributes:
        missed: number of heartbeats that it has missed.
        phases: number of phases and pauses in its last row.
        phase: its main thread's phase there.
        paused: whether it was after that phase.
        idle: whether it only waited there.
    """

    missed: int
    phases: int
    phase: str
    paused: bool
    idle: bool

    @classmethod
    def of(cls, row: Row, missed: int) -> Silence:
        return cls(missed, row.phases, row.phase, row.paused, row.idle)

    @property
    def where(self) -> str:
        return f"{'after' if self.paused else 'in'} {self.phase}"

    @property
    def busy(self) -> bool:
        """Whether the rank may have missed heartbeats because of what it does between phases."""
        return self.paused and not self.idle


@dataclass(frozen=True)
class Board:
    """State of the whole job, small where all is well.

    Attributes:
        term: number of judges that were chosen before this one.
        judge: number of the node whose leader writes the board.
        beat: number of boards so far.
        silent: {rank: its silence}, of ranks that have not closed.
        closed: ranks that have ended without an error.
        said: whether a rank has printed why the job ends.
        asks: lowest living rank in which a collective failed, or that ends the job.
        hang: says which ranks make the others wait, or "".
    """

    term: int = 0
    judge: int = 0
    beat: int = 0
    silent: dict[int, Silence] = field(default_factory=dict)
    closed: frozenset[int] = frozenset()
    said: bool = False
    asks: int | None = None
    hang: str = ""

    @property
    def age(self) -> tuple[int, int]:
        """A later board has a larger one."""
        return self.term, self.beat

    def encode(self) -> str:
        """The board as text. Neighbouring ranks with equal silence share an entry."""
        silent = [
            [first, last, *self.silent[first]]
            for _, ranks in itertools.groupby(sorted(self.silent), key=self.silent.__getitem__)
            for first, last in spans(ranks)
        ]
        closed = list(spans(self.closed))
        state = [*self.age, self.judge, silent, closed, self.said, self.asks, self.hang]
        return json.dumps(state, ensure_ascii=False)

    @classmethod
    def decode(cls, text: str) -> Board:
        term, beat, judge, silent, closed, said, asks, hang = json.loads(text)
        return cls(
            term,
            judge,
            beat,
            {r: Silence(*rest) for first, last, *rest in silent for r in range(first, last + 1)},
            frozenset(r for first, last in closed for r in range(first, last + 1)),
            said,
            asks,
            hang,
        )


def hang_of(rows: Mapping[int, Row], limit: float) -> str:
    """Says which ranks make the others wait, or "": those last in phase that do not wait.

    Args:
        rows: the last rows of all ranks.
        limit: number of heartbeats that a main thread may stay in one phase.
    """
    rows = {rank: row for rank, row in rows.items() if not row.closed}
    last = min((row.phases for row in rows.values()), default=0)
    late = {rank: row for rank, row in rows.items() if row.phases == last}
    if not late or any(r.paused or r.beat - r.since <= limit for r in late.values()):
        return ""
    guilty = {rank: row for rank, row in late.items() if not row.waits} or late
    others = {rank: row for rank, row in rows.items() if rank not in guilty}
    phase = next(row.phase for row in guilty.values())
    sentence = f"{_verb(guilty, 'hang')} in {phase}{_places(guilty)}"
    return f"{sentence} while {_verb(others, 'wait')}{_places(others)}" if others else sentence


def spans(ranks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """First and last rank of each run of consecutive ranks."""
    runs = itertools.groupby(enumerate(sorted(ranks)), key=lambda pair: pair[1] - pair[0])
    for _, run in runs:
        members = [rank for _, rank in run]
        yield members[0], members[-1]


def names(ranks: Collection[int]) -> str:
    """Ranks as text: ``rank 3`` or ``ranks 0-2, 5``."""
    texts = [f"{first}-{last}" if last > first else f"{first}" for first, last in spans(ranks)]
    return ("ranks " if len(ranks) > 1 else "rank ") + ", ".join(texts)


def _verb(ranks: Collection[int], verb: str) -> str:
    return f"{names(ranks)} {verb}{'s' * (len(ranks) == 1)}"


def _places(rows: Mapping[int, Row]) -> str:
    """Places of these ranks as text, at most ``MOST_PLACES``; ranks at one place are grouped."""
    at = defaultdict(list)
    for rank, row in rows.items():
        at[row.place].append(rank)
    if len(at) == 1:
        return f" at {next(iter(at))}"
    text = "".join(f", {names(at[place])} at {place}" for place in list(at)[:MOST_PLACES])
    return text + (", others elsewhere" if len(at) > MOST_PLACES else "")
