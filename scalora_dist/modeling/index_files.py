"""Reads the index of a model that is saved in several files. An index may come from anyone."""

from __future__ import annotations

import json
from pathlib import Path, PurePath

# Of safetensors files, and of the pickled ones that transformers also takes.
NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def weight_map(index: Path) -> dict[str, str]:
    """{parameter: name of the file that holds it, relative to the folder of ``index``}.

    Names are checked, not where links lead: the files of a hub's cache are links out of their
    folder.

    Raises:
        ValueError: the file is not an index of weights, or names a file outside of its folder.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(index.read_text())
    except RecursionError as error:
        raise ValueError(f"{index.name} is nested too deeply") from error
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(x, str) and x for x in files.values()):
        raise ValueError(f"{index.name} has no weight_map of file names")
    if not isinstance(content.get("metadata"), dict):  # transformers reads it, too
        raise ValueError(f"{index.name} has no metadata")
    for file in files.values():
        path = PurePath(file)
        if path.is_absolute() or ".." in path.parts or not file.isprintable():
            raise ValueError(f"{index.name} names {file!r}, which is not in its folder")
    return files


def check_index_files(folder: Path) -> None:
    """Check the indexes of a model's folder before transformers opens what they name.

    For a model of the hub, huggingface_hub makes this check.

    Raises:
        ValueError: an index file is not an index of weights, or names a file outside of ``folder``.
        OSError: an index cannot be read.
    """
    for name in NAMES:
        if (folder / name).is_file():
            weight_map(folder / name)
