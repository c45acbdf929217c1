"""The files of a checkpoint: finding, verifying, publishing and deleting checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

FOLDER = re.compile(r"checkpoint-(\d+)")
LEFTOVER = re.compile(r"checkpoint-\d+\.(partial|old)")
MANIFEST, STATE, INDEX = "manifest.json", "state.json", "index.json"
FORMAT = 2  # of state.json and of the tensors' names
RANDOM = "random."  # begins the names of the ranks' random states
LIBRARIES = ("scalora_dist", "torch", "transformers", "datasets", "deepspeed", "bitsandbytes")
READ_BYTES = 2**24


class FileRecord(TypedDict):
    bytes: int
    sha256: str


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint's folder. None for any other name."""
    match = FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoints in a folder, sound or damaged, the newest first."""
    found = {step_of(path): path for path in output_dir.glob("checkpoint-*") if path.is_dir()}
    return [found[step] for step in sorted(step for step in found if step is not None)][::-1]


def write_synced(path: Path, data: bytes) -> FileRecord:
    """Write a small file so that it survives a crash of the machine."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def publish(partial: Path, folder: Path, files: dict[str, FileRecord]) -> None:
    """Turn ``partial``, whose files are already on disk, into the checkpoint ``folder``.

    The checkpoint appears with all its files at once, by a rename.

    Raises:
        OSError: the disk is full, or a file is missing because nodes do not share the folder.
    """
    for name, record in files.items():
        if (partial / name).stat().st_size != record["bytes"]:
            raise OSError(f"{name} is not all there: do all nodes share {partial.parent}?")
    write_synced(partial / MANIFEST, json.dumps({"files": files}, indent=2).encode())
    _sync_folder(partial)
    old = _aside(folder)  # an earlier checkpoint of the same step, deleted only afterwards
    partial.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
    _sync_folder(folder.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first: an interrupted deletion leaves no partial one."""
    shutil.rmtree(_aside(folder), ignore_errors=True)


def _aside(folder: Path) -> Path:
    """Rename ``folder``, if it exists, to the name of a leftover. Returns that name."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    return old


def clear_leftovers(output_dir: Path) -> None:
    """Delete checkpoints that a killed run had begun to write or to delete."""
    for path in output_dir.glob("checkpoint-*"):
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def prune(output_dir: Path, keep: int, newest: Path | None = None) -> None:
    """Delete all but the newest ``keep`` checkpoints, counted from ``newest`` down.

    Also deletes checkpoints with a higher step than ``newest``: they were damaged, and the run
    resumed from before them.
    """
    found = checkpoints(output_dir)
    first = found.index(newest) if newest else 0
    for folder in (*found[:first], *found[first + keep :]):
        remove(folder)


def read_manifest(folder: Path) -> dict[str, FileRecord] | str:
    """{file: its size and checksum}, or a text that says what is wrong with the manifest."""
    try:
        files: dict[str, FileRecord] = json.loads((folder / MANIFEST).read_bytes())["files"]
        # A name in the manifest must not point outside the folder.
        files = {str(Path(name).name): record for name, record in files.items()}
        # A file that is not listed would be read unchecked.
        there = {STATE, *(path.name for path in folder.glob("*.safetensors"))}
        if (folder / INDEX).exists():  # older checkpoints have none
            there.add(INDEX)
        if missed := sorted(there - files.keys()):
            return f"{MANIFEST} is damaged (it does not list {', '.join(missed)})"
        return files
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{MANIFEST} is damaged"


def faults(
    folder: Path,
    files: dict[str, FileRecord],
    names: Sequence[str],
    read: Callable[[int], object] | None = None,
) -> list[str]:
    """What is wrong with the files ``names``: one clause for each damaged file.

    Args:
        files: the manifest.
        read: called with a number of bytes, whenever so many more are read.
    """
    found = []
    for name in names:
        path, record = folder / name, files[name]
        try:
            if path.stat().st_size != record["bytes"]:
                found.append(f"{name} has {path.stat().st_size} bytes, not {record['bytes']}")
            elif sha256(path, read) != record["sha256"]:
                found.append(f"{name} is damaged (its checksum differs)")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except (OSError, KeyError, TypeError) as error:
            found.append(f"{name} cannot be read ({error})")
    return found


def is_sound(folder: Path) -> bool:
    """Whether a checkpoint has no faults. Reads all its files."""
    files = read_manifest(folder)
    return not isinstance(files, str) and not faults(folder, files, list(files))


def sha256(path: Path, read: Callable[[int], object] | None = None) -> str:
    """The checksum of a file in hexadecimal; ``read`` as for `faults`."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            if read:
                read(len(block))
    return digest.hexdigest()


def read_state(folder: Path) -> dict[str, Any]:
    """The contents of ``state.json`` of a sound checkpoint."""
    state: dict[str, Any] = json.loads((folder / STATE).read_bytes())
    return state


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
