"""A folder that appears with all its files at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scalora_dist.errors import UserError


@contextmanager
def written_aside(folder: Path, *, is_main: bool) -> Iterator[Path]:
    """A temporary folder that is renamed to ``folder`` at the end, so ``folder`` is never partial.

    Only rank 0 makes, renames and removes folders. After an error it frees what it took.
    """
    aside = folder.with_name(f"{folder.name}.partial")
    if is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    try:
        yield aside
    except (OSError, UserError):
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if is_main:
        shutil.rmtree(folder, ignore_errors=True)
        aside.replace(folder)
