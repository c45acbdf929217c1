"""Reads CSV and TSV files: each cell is its text, whatever it looks like."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from scalora_dist.data.text_lines import read_lines
from scalora_dist.errors import UserError

# The line where a record starts, and its cells.
Record = tuple[int, list[str]]


def read_table(
    path: Path, label: str, delimiter: str, column_names: Sequence[str], notes: list[str]
) -> Iterator[tuple[str, int]]:
    """Yield each row as a JSON object, and the line where it starts.

    An empty cell is an empty string. A CSV file is read with quotes. In a TSV file quotes may be
    plain text: see `_has_quoted_cells`.

    Args:
        label: the file's name in messages.
        column_names: names of the columns, if the file has no header line. One that has just these
            names is a header all the same.
        notes: gets what the user must know of how the file was read.

    Raises:
        UserError: two columns have the same name, quotes do not match, or a row has more or fewer
            cells than there are columns.
    """
    quoted = delimiter == "," or _has_quoted_cells(path, label, delimiter)
    if not quoted:
        notes.append("its quotes are read as text, as they do not enclose cells")
    lines = read_lines(path, label)
    records = _quoted_records(lines, label, delimiter) if quoted else _plain_records(lines)
    line, first = next(records, (0, []))
    header = [name.strip() for name in first]
    names, width_of = [*column_names], "--column_names has"
    if names and names != header:  # there is no header
        records = chain([(line, first)], records)
    elif not names:
        names, width_of = header, "the header has"
        if len(names) == 1 and re.search(r"[;\t]", names[0]):
            separator = "comma" if delimiter == "," else "tab"
            raise UserError(f"{label}: its header has no {separator} to separate the cells.")
    _check_names(names, "--column_names" if column_names else label)
    for row, (line, cells) in enumerate(records, start=1):
        if len(cells) != len(names):
            count = f"it has {len(cells)} cell{'s' * (len(cells) != 1)}"
            raise UserError(f"{label}, row {row} (line {line}): {count}, {width_of} {len(names)}.")
        yield json.dumps(dict(zip(names, cells, strict=True))), line


def _check_names(names: Sequence[str], source: str) -> None:
    # One name may be empty: many files have a first column of row numbers without a name.
    for name, times in Counter(names).items():
        if times > 1:
            raise UserError(f"{source}: {times} columns have the name {name!r}.")


def _has_quoted_cells(path: Path, label: str, delimiter: str) -> bool:
    """Whether the quotes of a TSV file enclose cells. Pandas and Excel write such files.

    In others, as in GLUE's, quotes are plain text and need not match. The reading that fits the
    whole file is right. If both fit, an opening and a closing quote of two lines may have met: then
    each line is a row. Lines of one column fit always, so they show nothing.
    """
    quoted = _even(_quoted_records(read_lines(path, label), label, delimiter))
    plain = _even(_plain_records(read_lines(path, label)))
    return bool(quoted and (plain is None or quoted[1] == 1 or plain[0] == quoted[0]))


def _even(records: Iterable[Record]) -> tuple[int, int] | None:
    """Number of records and of cells of each; None if malformed or not all have equally many."""
    try:
        widths = Counter(len(cells) for _, cells in records)
    except UserError:
        return None
    if len(widths) != 1:
        return None
    ((width, rows),) = widths.items()
    return rows, width


def _quoted_records(lines: Iterable[str], label: str, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:  # not a blank line
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{label}, line {line}: malformed ({error}).") from None


def _plain_records(lines: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        text = line.removesuffix("\n").removesuffix("\r")
        if text:
            yield number, text.split("\t")
