"""Integer arithmetic."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def mostly_padding(rows: int, ranks: int) -> bool:
    """Whether as many rows from each rank are twice ``rows``, or more.

    Then an all-gather of them brings no less than an all-reduce of a table of ``rows``.
    """
    return ranks * ceil_div(rows, ranks) >= 2 * rows
