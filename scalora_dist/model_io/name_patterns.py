"""Matches layer names against the patterns of an adapter's config, without backtracking.

The patterns are regular expressions from a file that may come from anyone. Python's ``re`` tries
one way to match after another, and for some patterns there are 2ⁿ ways. Here all ways advance
together, one character of the name at a time (Thompson, 1968). So a match takes a number of steps
in proportion to ``len(pattern) × len(name)``, whatever the pattern is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

LONGEST = 1000  # characters of a pattern

# A pattern's parts: one character of a name; a group's begin and end, the bar between alternatives;
# a repeat (a "?" after it does not change what matches); the name's begin and end.
_TOKEN = re.compile(
    r"(?P<one>\\[dDwWsS]|\\[^a-zA-Z0-9]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\\[\](){}*+?|^$])"
    r"|(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<either>\|)|(?P<repeat>[*+?])\??|(?P<edge>[\^$])",
    re.DOTALL,
)


@dataclass(frozen=True)
class _One:
    """Passes over one character that ``fits``, to the next instruction."""

    fits: Callable[[str], object]


@dataclass(frozen=True)
class _Edge:
    """Goes to the next instruction at the begin ("^") or the end ("$") of the name only."""

    kind: str


@dataclass(frozen=True)
class _Jump:
    """Goes to each of the instructions at these distances, without passing over a character."""

    distances: tuple[int, ...]


_Program: TypeAlias = list[_One | _Edge | _Jump]


class NamePattern:
    """A pattern of layer names, as PEFT reads the keys of ``alpha_pattern``.

    It matches a name if it fits the whole name, or all that comes after one of the name's dots.

    A pattern is a Python regular expression of characters, escapes, sets, groups and the signs
    ``. | * + ? ^ $``. Refused are: escapes of letters that are no class of characters (outside of
    sets), counts ``{2,3}`` and unescaped braces, a ``]`` without ``[``, possessive repeats,
    back-references, and groups that begin with ``(?`` except ``(?:``.
    """

    def __init__(self, pattern: str) -> None:
        """
        Raises:
            ValueError: the pattern is too long, or no regular expression of these.
        """
        if len(pattern) > LONGEST:
            raise ValueError(f"a pattern is longer than {LONGEST} characters")
        self.program = [*_compile(pattern), _Jump(())]  # reaching the last one means a match

    def matches(self, name: str) -> bool:
        active: set[int] = set()
        for position in range(len(name) + 1):
            if position == 0 or name[position - 1] == ".":
                active.add(0)
            active = self._reached(active, position, len(name))
            if position < len(name):
                active = {at + 1 for at in active if self._passes(at, name[position])}
        return len(self.program) - 1 in active

    def _passes(self, at: int, character: str) -> bool:
        step = self.program[at]
        return isinstance(step, _One) and bool(step.fits(character))

    def _reached(self, active: Iterable[int], position: int, end: int) -> set[int]:
        """The instructions that ``active`` ones lead to at this position, and themselves."""
        reached: set[int] = set()
        ahead = list(active)
        while ahead:
            at = ahead.pop()
            if at in reached:
                continue
            reached.add(at)
            step = self.program[at]
            if isinstance(step, _Jump):
                ahead += [at + distance for distance in step.distances]
            elif isinstance(step, _Edge) and position == (0 if step.kind == "^" else end):
                ahead.append(at + 1)
        return reached


def _compile(pattern: str) -> _Program:
    """The instructions of a pattern. Where it fits, they lead to the one after the last."""
    # The groups that are open, outermost first. A group is a list of alternatives, and these are
    # lists of pieces.
    groups: list[list[list[_Program]]] = [[[]]]
    position, repeatable = 0, False
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        kind = token.lastgroup if token else None
        if token is None or (kind == "repeat" and not repeatable):
            raise _refuse(pattern, position)
        pieces = groups[-1][-1]
        if kind == "one":
            pieces.append([_one(pattern, token)])
        elif kind == "edge":
            pieces.append([_Edge(token["edge"])])
        elif kind == "repeat":
            pieces.append(_repeated(pieces.pop(), token["repeat"]))
        elif kind == "either":
            groups[-1].append([])
        elif kind == "open":
            groups.append([[]])
        elif len(groups) == 1:
            raise _refuse(pattern, position)
        else:
            piece = _either(groups.pop())
            groups[-1][-1].append(piece)
        repeatable = kind in ("one", "close")
        position = token.end()
    if len(groups) > 1:
        raise _refuse(pattern, position)
    return _either(groups[0])


def _one(pattern: str, token: re.Match[str]) -> _One:
    try:
        return _One(re.compile(token["one"], re.DOTALL).fullmatch)
    except re.error as error:  # a set such as [z-a]
        raise _refuse(pattern, token.start()) from error


def _either(alternatives: list[list[_Program]]) -> _Program:
    *firsts, last = ([step for piece in pieces for step in piece] for pieces in alternatives)
    program: _Program = last
    for first in reversed(firsts):
        program = [_Jump((1, len(first) + 2)), *first, _Jump((len(program) + 1,)), *program]
    return program


def _repeated(piece: _Program, times: str) -> _Program:
    if times == "+":
        return [*piece, _Jump((-len(piece), 1))]
    if times == "*":
        return [_Jump((1, len(piece) + 2)), *piece, _Jump((-len(piece) - 1,))]
    return [_Jump((1, len(piece) + 1)), *piece]


def _refuse(pattern: str, position: int) -> ValueError:
    return ValueError(f"cannot read character {position + 1} of the pattern {pattern!r}")
