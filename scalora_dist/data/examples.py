"""Reads the examples of a data set, each in the layout of its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from scalora_dist.config.data import DataArguments
from scalora_dist.data.files import TABLES, kind_of
from scalora_dist.data.prompts import Example, Row, Shape, from_templates, recognise
from scalora_dist.data.rows import place, read_row
from scalora_dist.errors import UserError


class Examples:
    """The examples of a data set.

    The first row of a file decides the layout of all its rows, also where a slice leaves that row
    out. Files of one folder may have different ones.

    Attributes:
        name: the data set's name in messages.
    """

    def __init__(self, dataset: Dataset, name: str, args: DataArguments) -> None:
        """
        Raises:
            UserError: a template is malformed, or the columns of typed data are no known layout.
        """
        self.name = name
        self._given = _given_shape(args)
        self._shapes: dict[str, Shape] = {}
        self._typed = None
        if "raw_json" not in dataset.column_names:
            self._typed = self._shape(dataset.column_names, name)

    def read(self, row: dict[str, Any], index: int) -> tuple[Row, Example]:
        """The columns of a row of the data set, and the example that they hold.

        Raises:
            UserError: the row is malformed, or its file has no known layout.
        """
        shape = self._typed or self._shape_of_file(row)
        try:
            columns = Row(read_row(row))
            return columns, shape.read(columns)
        except UserError as error:
            raise self.at(row, index, error) from None

    def at(self, row: dict[str, Any], index: int, error: UserError) -> UserError:
        """The error with the place of the row that it is about."""
        return UserError(f"{place(row, index, self.name)}: {error}.")

    def _shape_of_file(self, row: dict[str, Any]) -> Shape:
        columns = row["columns"]
        if columns not in self._shapes:
            self._shapes[columns] = self._shape(json.loads(columns), row["file"])
        return self._shapes[columns]

    def _shape(self, columns: list[str], where: str) -> Shape:
        try:
            return self._given or recognise(columns)
        except UserError as error:
            hint = "; if it has no header line, give --column_names"
            is_table = kind_of(Path(where)) in TABLES
            raise UserError(f"{where}: {error}{hint * is_table}.") from None


def _given_shape(args: DataArguments) -> Shape | None:
    if args.prompt_template is None and args.completion_template is None:
        return None
    if args.prompt_template is None or args.completion_template is None:
        raise UserError("Set --prompt_template and --completion_template together.")
    try:
        return from_templates(args.prompt_template, args.completion_template)
    except UserError as error:
        raise UserError(f"{error}.") from None
