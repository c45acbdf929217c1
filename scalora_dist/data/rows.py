"""The raw columns of an example, as its file holds them, and where in the data it stands."""

from __future__ import annotations

import json
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from datasets import Features, Value

# What `data.files` makes of a file: each example as JSON text, so that nothing is retyped.
FROM_FILE = Features(
    {
        "raw_json": Value("string"),
        "file": Value("string"),
        "row": Value("int64"),  # counted from 1 within the file
        "line": Value("int64"),  # counted from 1; 0: the file has no lines
        "columns": Value("string"),  # names of the columns of the file's first row, as a JSON list
        "note": Value("string"),  # what the user must know of how the file was read
    }
)


def read_row(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of an example by name.

    A row of a file is as the file holds it. A row of another data set has typed columns, where
    Arrow gives each dict of a list the keys of all of them: keys that are null are left out there.
    """
    if "raw_json" in row:
        return json.loads(row["raw_json"])
    return {name: as_json(value) for name, value in row.items()}


def place(row: dict[str, Any], index: int, name: str) -> str:
    """Where an example stands, for messages: "d.csv, row 2 (line 3)".

    Args:
        row: the example, as its data set holds it.
        index: its index in the data set, counted from 0.
        name: the data set's name.
    """
    if "raw_json" not in row:
        return f"{name}, row {index + 1}"
    line = f" (line {row['line']})" if row["line"] not in (0, row["row"]) else ""
    return f"{row['file']}, row {row['row']}{line}"


def as_json(value: Any) -> Any:
    """A typed value as a JSON file would hold it.

    A dict has no null keys, which Arrow adds, at any depth. Dates are in ISO form, decimals and
    durations are text. Other values that JSON lacks stay as they are.
    """
    if isinstance(value, list):
        return [as_json(item) for item in value]
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items() if item is not None}
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    return str(value) if isinstance(value, Decimal | timedelta) else value
