"""``scalora checkpoint``: says what is in a checkpoint, and whether it is sound."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from scalora_dist.checkpoint.contents import (
    Row,
    describe_state,
    read_whole_state,
    tensors_by_kind,
)
from scalora_dist.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    checkpoints,
    faults,
    read_manifest,
    step_of,
)
from scalora_dist.errors import UserError

HELP = """usage: scalora checkpoint CHECKPOINT

What is in a checkpoint, and whether it is sound: all its files are read. CHECKPOINT is a folder
checkpoint-<step>, or a run's output_dir: then its newest checkpoint is described, and the others
are listed. The status is 0 if the checkpoint is sound, and 1 if it is damaged or of another format.
It needs one process, no GPU, and neither the base model nor the data."""
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
MOST_FILES = 8  # with more files, their sizes are summed up
SHOW_AFTER = 2.0  # seconds until the progress bar appears


def checkpoint_command(words: Sequence[str]) -> None:
    """Describe a checkpoint. Exits with status 1 if it is damaged.

    Args:
        words: the folder's name.

    Raises:
        UserError: there is not one name, or it is no checkpoint and no folder with checkpoints.
    """
    if words and words[0] in ("--help", "-h"):
        print(HELP)
        return
    if len(words) != 1 or words[0].startswith("-"):
        raise UserError(
            "scalora checkpoint: name one folder, a checkpoint or the output_dir of a run"
        )
    folder, others = find(Path(words[0]))
    rows, found = describe(folder)
    verdict = ["sound: all files have the sizes and checksums of the manifest"]
    rows.append(("DAMAGED", found) if found else ("state", verdict))
    rows += [(other.name, [outline(other)]) for other in others]
    print(render(rows))
    if found:
        sys.exit(1)


def find(named: Path) -> tuple[Path, list[Path]]:
    """The checkpoint that a path means, and the run's others, which are to be listed.

    Raises:
        UserError: it is no checkpoint, and holds none.
    """
    if named.is_dir() and (step_of(named) is not None or (named / MANIFEST).exists()):
        return named, []
    if not named.is_dir():
        raise UserError(f"{named} is no folder: name a checkpoint, or the output_dir of a run")
    found = checkpoints(named)
    if not found:
        raise UserError(
            f"{named} is no checkpoint and holds none: name a folder checkpoint-<step>, or the "
            "output_dir of a run"
        )
    return found[0], found[1:]


def describe(folder: Path) -> tuple[list[Row], list[str]]:
    """Rows of all that is known of a checkpoint, and what is wrong with it: one clause a fault.

    Reads all its files.
    """
    rows: list[Row] = [("checkpoint", [str(folder)]), ("written", [written(folder)])]
    files = read_manifest(folder)
    found = all_faults(folder, files)
    state = read_whole_state(folder)
    told = state if isinstance(state, str) else describe_state(state)
    if isinstance(told, str):
        found.append(told)
    else:
        rows += told
    amounts = tensors_by_kind(folder)
    if isinstance(amounts, str):
        found.append(amounts)
    else:
        rows += [
            (kind, [f"{x.tensors:,} tensors, {x.numbers:,} numbers, {size(x.bytes)}"])
            for kind, x in amounts.items()
        ]
    if not isinstance(files, str):
        rows.append(("files", listed(files)))
    return rows, list(dict.fromkeys(found))


def all_faults(folder: Path, files: dict[str, FileRecord] | str) -> list[str]:
    """What is wrong with a checkpoint, one clause a fault. Reads all its files, with a bar.

    Args:
        files: what ``read_manifest`` returned.
    """
    if isinstance(files, str):
        return [files]
    total = sum(record["bytes"] for record in files.values())
    with tqdm(
        total=total, desc="reading", unit="B", unit_scale=True, delay=SHOW_AFTER, leave=False
    ) as progress:
        return faults(folder, files, list(files), progress.update)


def listed(files: dict[str, FileRecord]) -> list[str]:
    """A line for each file, or for all files where they are many."""
    sizes = [record["bytes"] for record in files.values()]
    whole = f"{len(files)} files, {size(sum(sizes))}"
    if len(files) > MOST_FILES:
        return [f"{whole}, {size(min(sizes))} to {size(max(sizes))} each"]
    return [whole, *(f"{name}, {size(record['bytes'])}" for name, record in files.items())]


def outline(folder: Path) -> str:
    """One line of a checkpoint whose files are not read."""
    files = read_manifest(folder)
    if isinstance(files, str):
        return files
    total = size(sum(record["bytes"] for record in files.values()))
    return f"{len(files)} files, {total}, written {written(folder)}; not read"


def written(folder: Path) -> str:
    """When a checkpoint was written, and how long ago that is."""
    manifest = folder / MANIFEST
    moment = (manifest if manifest.exists() else folder).stat().st_mtime
    seconds = max(0, int(time.time() - moment))
    unit, length = next(
        (
            (unit, length)
            for unit, length in (("days", 86400), ("h", 3600), ("min", 60))
            if seconds >= 2 * length
        ),
        ("s", 1),
    )
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
    return f"{clock} ({seconds // length} {unit} ago)"


def size(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {UNITS[unit]}" if unit else f"{count} {UNITS[0]}"


def render(rows: Sequence[Row]) -> str:
    """The rows as an aligned table of two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        f"  {name if i == 0 else '':<{width}}  {line}"
        for name, lines in rows
        for i, line in enumerate(lines)
    )
