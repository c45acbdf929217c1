"""Finds the longest example and the smallest and largest number of a column of tokenized data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

ROWS_AT_A_TIME = 1000


@dataclass(frozen=True)
class Extent:
    """What a column of lists spans.

    Attributes:
        longest: length of the longest list.
        least: the smallest number of all lists.
        most: the largest number of all lists.
    """

    longest: int
    least: int
    most: int


def stored_extent(dataset: Dataset, column: str) -> Extent:
    """The extent of all lists that are stored, also of rows that were not selected.

    Reads the file once, in order: about a second for 10⁹ tokens in memory.
    """
    return _extent([dataset.data.column(column)])


def extent(dataset: Dataset, column: str) -> Extent:
    """The extent of the data set's own lists. Slower than ``stored_extent`` on selected rows."""
    return _extent(_selected(dataset, column))


def _selected(dataset: Dataset, column: str) -> Iterator[pa.ChunkedArray]:
    lists = dataset.select_columns([column]).with_format("arrow")
    for table in lists.iter(batch_size=ROWS_AT_A_TIME):
        yield table.column(column)


def _extent(parts: Iterable[pa.ChunkedArray]) -> Extent:
    """The extent of lists; there is at least one number."""
    longest, least, most = [], [], []
    for lists in parts:
        ends = pc.min_max(pc.list_flatten(lists))
        if ends["max"].is_valid:  # else there are only empty lists
            longest.append(pc.max(pc.list_value_length(lists)).as_py())
            least.append(ends["min"].as_py())
            most.append(ends["max"].as_py())
    return Extent(max(longest), min(least), max(most))
