"""A folder that appears with all its files at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(folder: Path, *, is_main: bool) -> Iterator[Path]:
    """A temporary folder that is renamed to ``folder`` at the end, so ``folder`` is never partial.

    Only rank 0 makes, renames and removes folders. After an error it frees what it took.
    """
    aside = aside_of(folder)
    if is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:
        if is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if is_main:
        shutil.rmtree(folder, ignore_errors=True)
        aside.replace(folder)


def aside_of(folder: Path) -> Path:
    """Where ``folder`` is written until it is whole."""
    return folder.with_name(f"{folder.name}.partial")
