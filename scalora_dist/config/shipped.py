"""Finds the configs and recipes that come with the project, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

import scalora_dist

Kind: TypeAlias = Literal["ds_configs", "recipes", "fsdp"]

PACKAGE = Path(scalora_dist.__file__).parent
# Where a wheel has them, and where a checkout does.
FOLDERS: dict[Kind, tuple[Path, Path]] = {
    "ds_configs": (PACKAGE / "shipped" / "ds_configs", PACKAGE.parent / "ds_configs"),
    "recipes": (PACKAGE / "shipped" / "recipes", PACKAGE.parent / "launch" / "recipes"),
    "fsdp": (PACKAGE / "shipped" / "fsdp", PACKAGE.parent / "launch" / "fsdp"),
}


def shipped(kind: Kind) -> dict[str, Path]:
    """{name: file}; the name has no ending, such as "zero3"."""
    files = (path for folder in FOLDERS[kind] for path in folder.glob("*.*"))
    return {path.stem: path for path in sorted(files)}


def find(kind: Kind, given: str | None) -> str | None:
    """The path of a file that was given by its path or by its name among the shipped ones.

    A file in the working directory comes first. What is neither is returned as it was given.
    """
    if given is None or Path(given).is_file():
        return given
    return str(shipped(kind).get(given, given))


def names(kind: Kind) -> str:
    """The names of the shipped files, for messages."""
    return ", ".join(shipped(kind))
