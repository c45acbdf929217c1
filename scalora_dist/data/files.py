"""Reads the examples of data files as JSON text, so that no value changes its type.

A file is of the kind that its name says, and its path is never a pattern.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from scalora_dist.data.delimited import read_table
from scalora_dist.data.rows import FROM_FILE, as_json
from scalora_dist.data.text_lines import COMPRESSED, read_lines
from scalora_dist.errors import UserError

TEXT = ".txt"
PARQUET = ".parquet"
TABLES = {".csv": ",", ".tsv": "\t"}  # and what separates their cells
KINDS = (".json", ".jsonl", ".ndjson", *TABLES, TEXT, PARQUET)
# An example as JSON text, and the line where it starts; 0: the file has no lines.
Located = tuple[str, int]


def kind_of(path: Path) -> str | None:
    """The kind of a data file: ".csv" for "D.CSV.gz"; None if it is no data file."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        inner = Path(path.stem).suffix.lower()
        return inner if inner in KINDS and inner != PARQUET else None  # it is compressed inside
    return suffix if suffix in KINDS else None


def read_files(
    files: Sequence[tuple[str, str]], column_names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of `rows.FROM_FILE` of several files.

    Args:
        files: path of each file, and its name in messages.
        column_names: names of the columns of CSV and TSV files, which then have no header line.

    Raises:
        UserError: a file is malformed or cannot be read. The message names the file and, where
            possible, the line.
    """
    for path, label in files:
        try:
            notes: list[str] = []
            examples = _read_file(Path(path), label, column_names, notes)
            columns = ""
            for row, (text, line) in enumerate(examples, start=1):
                columns = columns or json.dumps([*json.loads(text)])
                note = f"{label}: {'; '.join(notes)}" if notes else ""
                yield dict(zip(FROM_FILE, (text, label, row, line, columns, note), strict=True))
        except UserError:
            raise
        # pyarrow and the libraries of archives raise errors of many types.
        except Exception as error:
            raise UserError(f"{label} cannot be read: {reason(error)}.") from error


def reason(error: BaseException) -> str:
    """The first line of the error that caused `error`, without its full stop."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")


def _read_file(
    path: Path, label: str, column_names: Sequence[str], notes: list[str]
) -> Iterator[Located]:
    kind = kind_of(path)
    if kind is None:
        raise UserError(
            f"{label} is of no known kind: its name must end in {', '.join(KINDS)}, "
            f"all but the last with or without {', '.join(COMPRESSED)}."
        )
    if kind == PARQUET:
        return _read_parquet(path, notes)
    if kind in TABLES:
        return read_table(path, label, TABLES[kind], column_names, notes)
    return _read_text(path, label) if kind == TEXT else _read_json(path, label, kind)


def _read_text(path: Path, label: str) -> Iterator[Located]:
    for number, line in enumerate(read_lines(path, label), start=1):
        if line.strip():
            yield json.dumps({"text": line.removesuffix("\n").removesuffix("\r")}), number


def _read_json(path: Path, label: str, kind: str) -> Iterator[Located]:
    """Read one object per line, a list of objects, or one object: the content decides."""
    lines = ((n, line) for n, line in enumerate(read_lines(path, label), start=1) if line.strip())
    number, first = next(lines, (0, "{}"))
    if number == 0:
        return
    if first.lstrip().startswith("["):
        yield from _read_document("".join(read_lines(path, label)), label, None)
        return
    try:
        _check_object(first, label, number)
    except UserError as error:  # not an object on one line
        # The name decides which of two readings an error is about.
        as_lines = error if kind != ".json" else None
        yield from _read_document("".join(read_lines(path, label)), label, as_lines)
        return
    yield first.strip(), number
    for number, line in lines:
        _check_object(line, label, number)
        yield line.strip(), number


def _check_object(line: str, label: str, number: int) -> None:
    try:
        value = json.loads(line.rstrip("\r\n"))
    except JSONDecodeError as error:
        raise _malformed(label, number, error) from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 1000 brackets
        raise UserError(f"{label}, line {number}: unreadable JSON ({reason(error)}).") from None
    if not isinstance(value, dict):
        raise _no_object(label, number)


def _malformed(label: str, line: int, error: JSONDecodeError) -> UserError:
    what = error.msg.removesuffix(" at")
    return UserError(f"{label}, line {line}: malformed JSON ({what} at column {error.colno}).")


def _no_object(label: str, line: int) -> UserError:
    return UserError(f'{label}, line {line}: not a JSON object such as {{"prompt": ...}}.')


def _read_document(text: str, label: str, as_lines: UserError | None) -> Iterator[Located]:
    """Read a list of objects or one object.

    Raises:
        UserError: `as_lines`, or a message of its own if that is None.
    """
    line, counted = 1, 0
    try:
        for start, end in _objects(text):
            line, counted = line + text.count("\n", counted, start), start
            if text[start] != "{":
                raise _no_object(label, line)
            yield text[start:end], line
    except JSONDecodeError as error:
        raise as_lines or _malformed(label, error.lineno, error) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{label}: unreadable JSON after line {line} ({reason(error)}).") from None


def _objects(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each item of a JSON list, or of the one value that is no list."""
    decode = json.JSONDecoder().raw_decode
    position = _skip_blanks(text, 0)
    if text[position] != "[":
        _, end = decode(text, position)
        yield position, end
    else:
        end = _skip_blanks(text, position + 1)
        more = text[end : end + 1] != "]"
        while more:
            position = end
            _, end = decode(text, position)
            yield position, end
            end = _skip_blanks(text, end)
            if text[end : end + 1] not in (",", "]"):
                raise JSONDecodeError("Expecting ',' delimiter", text, end)
            more = text[end] == ","
            end = _skip_blanks(text, end + 1) if more else end
        end += 1
    if text[end:].strip():
        raise JSONDecodeError("Extra data", text, _skip_blanks(text, end))


def _skip_blanks(text: str, position: int) -> int:
    while text[position : position + 1].isspace():
        position += 1
    return position


def _read_parquet(path: Path, notes: list[str]) -> Iterator[Located]:
    """Read row by row, without the columns that are no text and no numbers, such as images."""
    # An open file: pyarrow would take some names, as those with a colon, for addresses.
    with path.open("rb") as stream:
        file = pyarrow.parquet.ParquetFile(stream)
        left_out = {f.name: "it holds bytes" for f in file.schema_arrow if _holds_bytes(f.type)}
        names = [field.name for field in file.schema_arrow if field.name not in left_out]
        left_out |= _unreadable(file, names)
        names = [name for name in names if name not in left_out]
        notes += [f"its column {name} is left out ({why})" for name, why in left_out.items()]
        for batch in file.iter_batches(batch_size=100, columns=names):
            columns = [map(as_json, _values(column)) for column in batch.columns]
            for row in zip(*columns, strict=True):
                yield json.dumps(dict(zip(batch.schema.names, row, strict=True))), 0


def _unreadable(file: pyarrow.parquet.ParquetFile, names: list[str]) -> dict[str, str]:
    """The columns that hold something that Python or JSON cannot hold, and what."""
    found: dict[str, str] = {}
    for name in names:
        kind = file.schema_arrow.field(name).type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not (is_text or _is_bytes(kind) or pa.types.is_temporal(kind)):
            continue
        try:
            for batch in file.iter_batches(batch_size=1000, columns=[name]):
                batch.validate(full=True)
                if not is_text:
                    _values(batch.column(0))
        except (ValueError, OverflowError) as error:  # not UTF-8; a date of year 10000
            found[name] = reason(error)
    return found


def _values(column: pa.Array) -> list[Any]:
    """The values of a column. Some programs write texts as bytes."""
    if _is_bytes(column.type):
        column = column.cast(pa.binary()).cast(pa.string())
    return column.to_pylist()


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a type has bytes within lists or structs."""
    nested = [kind.field(k).type for k in range(kind.num_fields)]
    return any(_is_bytes(each) or _holds_bytes(each) for each in nested)


def _is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )
