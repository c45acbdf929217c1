"""The raw columns of an example, as its file holds them, and where in the data it stands."""

from __future__ import annotations

import json
from typing import Any

from datasets import Features, Value

# What `data.files` makes of a file: each example as JSON text, so that nothing is retyped.
FROM_FILE = Features(
    {
        "raw_json": Value("string"),
        "file": Value("string"),
        "row": Value("int64"),  # counted from 1 within the file
        "line": Value("int64"),  # counted from 1; 0: the file has no lines
    }
)


def read_row(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of an example by name.

    A row of a file is as the file holds it. A row of another data set has typed columns, where
    Arrow gives each dict of a list the keys of all of them: keys that are null are left out there.
    """
    if "raw_json" in row:
        return json.loads(row["raw_json"])
    return {name: without_nulls(value) for name, value in row.items()}


def place(row: dict[str, Any], index: int) -> str:
    """Where an example stands, for messages: "d.csv, row 2 (line 3)" or "Row 2 of the data set".

    Args:
        row: the example, as its data set holds it.
        index: its index in the data set, counted from 0.
    """
    if "raw_json" not in row:
        return f"Row {index + 1} of the data set"
    line = f" (line {row['line']})" if row["line"] not in (0, row["row"]) else ""
    return f"{row['file']}, row {row['row']}{line}"


def without_nulls(value: Any) -> Any:
    """The value without the null keys of its dicts, which Arrow adds, at any depth."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return value
