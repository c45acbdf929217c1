"""Integer arithmetic."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def mostly_padding(rows: int, ranks: int) -> bool:
    """Whether half of the ranks or more have none of ``rows`` rows, which they share.

    Then an all-gather, with as much from each rank, brings no less than an all-reduce of the rows.
    """
    return ranks >= 2 * rows
