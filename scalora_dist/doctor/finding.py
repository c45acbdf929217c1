"""One line of the doctor's table."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

NAMES = 15  # columns of a check's name
WIDTH = 110  # columns of the table


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        found: what was found.
        advice: one sentence that says what to do; None: all is well.
        fatal: whether a run would fail or train wrongly. Otherwise the advice is a warning.
    """

    found: str
    advice: str | None = None
    fatal: bool = True

    @property
    def failed(self) -> bool:
        return self.advice is not None and self.fatal

    def line(self, check: str) -> str:
        """The line of the check in the table, and what to do below it."""
        mark = "ok" if self.advice is None else "FAIL" if self.fatal else "warn"
        return line(mark, check, self.found, self.advice)


def line(mark: str, check: str, text: str, advice: str | None = None) -> str:
    margin = f"  {mark:<4}  {check:<{NAMES}} "
    below = " " * len(margin)
    lines = _wrapped(text, margin, below)
    return lines if advice is None else f"{lines}\n{_wrapped(advice, f'{below}-> ', f'{below}   ')}"


def _wrapped(text: str, first: str, others: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
