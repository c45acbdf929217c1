"""Reads the examples of a data set, each in the layout of its file."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from scalora_dist.config.data import DataArguments
from scalora_dist.data.prompts import Example, Row, Shape, from_templates, recognise
from scalora_dist.data.rows import place, read_row
from scalora_dist.errors import UserError


class Examples:
    """The examples of a data set.

    The first row of a file decides the layout of all its rows. Files of one folder may have
    different ones.
    """

    def __init__(self, dataset: Dataset, args: DataArguments) -> None:
        """Find the layouts.

        Raises:
            UserError: the columns of a file are no known layout, or lack one that a template names.
        """
        self.from_files = "raw_json" in dataset.column_names
        self._given = _given_shape(args)
        if self.from_files:
            self._shapes = {
                file: self._shape(read_row(dataset[index]), f"{file}: ")
                for file, index in _first_rows(dataset).items()
            }
        else:
            self._shapes = {"": self._shape(dataset.column_names, "The data set: ")}

    def read(self, row: dict[str, Any], index: int) -> tuple[Row, Example]:
        """The columns of a row of the data set, and the example that they hold.

        Raises:
            UserError: the row is malformed.
        """
        shape = self._shapes[row["file"] if self.from_files else ""]
        try:
            columns = Row(read_row(row))
            return columns, shape.read(columns)
        except UserError as error:
            raise at(row, index, error) from None

    def _shape(self, columns: Any, where: str) -> Shape:
        try:
            shape = self._given or recognise(columns)
        except UserError as error:
            raise UserError(f"{where}{error}.") from None
        if missing := [name for name in shape.columns if name not in columns]:
            raise UserError(
                f"{where}there is no column {missing[0]!r}, which a template names; there are: "
                f"{', '.join(columns)}."
            )
        return shape


def at(row: dict[str, Any], index: int, error: UserError) -> UserError:
    """The error with the place of the row that it is about."""
    return UserError(f"{place(row, index)}: {error}.")


def _first_rows(dataset: Dataset) -> dict[str, int]:
    """The index of the first row of each file."""
    found: dict[str, int] = {}
    begin = 0
    for table in dataset.select_columns(["file"]).with_format("arrow").iter(batch_size=10_000):
        files = table.column("file")
        for file in files.unique().to_pylist():
            if file not in found:
                found[file] = begin + files.index(file).as_py()
        begin += len(files)
    return found


def _given_shape(args: DataArguments) -> Shape | None:
    if args.prompt_template is None and args.completion_template is None:
        return None
    if args.prompt_template is None or args.completion_template is None:
        raise UserError("Set --prompt_template and --completion_template together.")
    return from_templates(args.prompt_template, args.completion_template)
