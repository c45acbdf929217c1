"""Finds the line in which a data file that cannot be read is broken."""

from __future__ import annotations

import json
from json import JSONDecodeError
from pathlib import Path

JSON_SUFFIXES = (".json", ".jsonl")


def find_malformed(path: Path) -> str | None:
    """Say in which line a JSON or JSONL file is broken; None if it parses or is another kind.

    `datasets` names neither the file nor the line, so the file is read again after the failure.
    """
    if path.suffix.lower() not in JSON_SUFFIXES:
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        above = path.read_bytes()[: error.start].count(b"\n")
        return f"{path}, line {above + 1}: this is not UTF-8 text"
    if path.suffix.lower() == ".json" and not _looks_like_lines(text):
        try:
            json.loads(text)
        except JSONDecodeError as error:
            return f"{path}, line {error.lineno}: malformed JSON ({error.msg})"
        return None
    # Not splitlines(): it also splits at U+2028 and others, which JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except JSONDecodeError as error:
            return f"{path}, line {number}: malformed JSON ({error.msg} at column {error.colno})"
        if not isinstance(row, dict):
            return f'{path}, line {number}: not a JSON object such as {{"prompt": ...}}'
    return None


def _looks_like_lines(text: str) -> bool:
    """Whether a .json file holds one object per line, as `datasets` also allows."""
    first = text.lstrip().split("\n", 1)[0]
    try:
        return isinstance(json.loads(first), dict)
    except JSONDecodeError:
        return False
