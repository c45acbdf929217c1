"""Parses the words of a command line into option dataclasses, and writes options as such words."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser

from scalora_dist.config.option import declarations
from scalora_dist.errors import UserError


class Parser(HfArgumentParser):  # type: ignore[misc]  # transformers is taken as Any
    """Raises a UserError instead of printing the usage and exiting."""

    source = ""  # what is being parsed, for messages

    @staticmethod
    def _parse_dataclass_field(parser: Any, field: Any) -> None:
        # All metadata becomes argparse's keywords, and argparse knows no declarations.
        known = copy.copy(field)
        known.metadata = {"help": field.metadata["help"]}
        HfArgumentParser._parse_dataclass_field(parser, known)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.source}{message}; --help lists the options")

    def parse_args_into_dataclasses(
        self, args: Sequence[str] | None = None, return_remaining_strings: bool = False
    ) -> tuple[Any, ...]:
        """As HfArgumentParser's, for the words of a command line alone.

        Raises:
            UserError: a word belongs to no option, and is not asked for.
        """
        *parsed, left = super().parse_args_into_dataclasses(args, return_remaining_strings=True)
        if return_remaining_strings:
            return (*parsed, left)
        if left:
            self.refuse(left[0])
        return tuple(parsed)

    @property
    def names(self) -> list[str]:
        """Names of all options."""
        return sorted(
            each.name for group in self.dataclass_types for each, _ in declarations(group)
        )

    def refuse(self, word: str) -> NoReturn:
        """
        Raises:
            UserError: always; it says why a word is no option.
        """
        if not word.startswith("-"):
            raise UserError(f"{word!r} belongs to no option: write --option value")
        raise UserError(unknown_option(word.lstrip("-").partition("=")[0], self.names))


def option_words(name: str, value: Any) -> list[str]:
    """One option of a YAML file as command-line words; none for null, which keeps the default."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def unknown_option(name: str, known: Sequence[str]) -> str:
    """Half a sentence for a name that is no option, with the option that it resembles."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    if close:
        return f"unknown option {name!r}: did you mean {close[0]}? --help lists the options"
    return f"unknown option {name!r}; the options are {', '.join(known)}"
