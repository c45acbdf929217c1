"""Checks that a run may write to its output folder, and moves earlier results out of the way."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from scalora_dist.checkpoint.manifest import checkpoints, clear_leftovers
from scalora_dist.config.options import Options
from scalora_dist.config.training import TrainArguments
from scalora_dist.distributed.stop_signals import PREEMPTED
from scalora_dist.errors import UserError
from scalora_dist.training import phases

# What a finished run leaves besides checkpoints, and what it writes on the way.
RESULTS = ("summary.json", "adapter", "model")
LOGS = ("metrics.jsonl", "tensorboard", "profile", PREEMPTED)
PARTIAL = tuple(f"{name}.partial" for name in (*RESULTS, "metrics.jsonl", phases.FILE))
# Earlier results stay in folders of this name until this run's results are whole.
REPLACED = "replaced-results"
_REPLACED = re.compile(rf"{REPLACED}(-\d+)?")


def check_output_dir(folder: Path, train: TrainArguments) -> None:
    """Refuse to write into a folder that has content.

    An exception: a run with ``resume_from_checkpoint`` latest may overwrite what a run left that
    died before its first checkpoint. That run has logs or a mark of its end, but no summary.

    Raises:
        UserError: ``folder`` is a file, or is not empty and ``overwrite_output_dir`` is not set.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file, or a link to nothing: name a folder")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    begun = names & {*LOGS, phases.FILE} and "summary.json" not in names
    resumes = train.resume_from_checkpoint == "latest" and begun
    empty = not names - {PREEMPTED}
    if not (empty or resumes or train.overwrite_output_dir):
        may_resume = train.resume_from_checkpoint != "latest"
        goes_on = may_resume and (checkpoints(folder) or phases.FILE in names)
        resume = "go on with --resume_from_checkpoint latest, " if goes_on else ""
        raise UserError(
            f"--output_dir {folder} is not empty: {resume}name another, or give "
            "--overwrite_output_dir"
        )
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {folder}: {there} cannot be written to: name another folder")


def check_inputs(folder: Path, options: Options, checkpoint: Path | None) -> None:
    """Refuse to replace what the run reads: base, adapter, data, configs, another checkpoint.

    Paths are compared resolved, with all links, and so are the files in a folder that is read.

    Args:
        folder: the run's ``output_dir``.
        checkpoint: the checkpoint in another folder that the run resumes from, or None.

    Raises:
        UserError: the run would replace, or delete, something that it reads.
    """
    written = [folder / name for name in (*RESULTS, *LOGS, *PARTIAL, phases.FILE)]
    written += [*checkpoints(folder), *_replaced(folder)]
    # Where an entry is a link, both the link and what it leads to count.
    places = {entry.parent.resolve() / entry.name for entry in written}
    places |= {entry.resolve() for entry in written}
    around = {parent: place for place in places for parent in place.parents}
    for option, name, nested in _inputs(options, checkpoint):
        for path in _paths(Path(name).expanduser(), nested=nested):
            shared = next((place for place in (path, *path.parents) if place in places), None)
            if shared is None and nested:
                shared = around.get(path)
            if shared:
                raise UserError(
                    f"--{option} {name} and --output_dir {folder} share {shared}, which this run "
                    "would replace: name another --output_dir"
                )


def _inputs(options: Options, checkpoint: Path | None) -> Iterator[tuple[str, str, bool]]:
    """(option, its value, whether files in subfolders are read too) of what the run reads."""
    data, launch = options.data, options.launch
    named = [
        ("model_name_or_path", options.model.model_name_or_path, False),
        ("adapter_name_or_path", options.model.adapter_name_or_path, False),
        ("dataset", data.dataset, True),
        ("eval_dataset", data.eval_dataset, True),
        ("config", launch.config, False),
        ("ds_config", launch.ds_config, False),
        ("fsdp_config", launch.fsdp_config, False),
        ("resume_from_checkpoint", checkpoint and str(checkpoint), False),
    ]
    for option, value, nested in named:
        if value and Path(value).expanduser().exists():  # otherwise a name on the hub
            yield option, value, nested


def _paths(path: Path, *, nested: bool) -> Iterator[Path]:
    """``path`` and the files in it, resolved."""
    yield path.resolve()
    if path.is_dir():
        yield from (entry.resolve() for entry in (path.rglob("*") if nested else path.iterdir()))


def set_aside(folder: Path, *, everything: bool = True) -> None:
    """Move an earlier run's results into ``replaced-results`` beside them.

    Logs alone are worth nothing and are deleted. It may be killed and called again.

    Args:
        folder: the run's ``output_dir``.
        everything: False: checkpoints and logs stay, because this run goes on from them.
    """
    clear_partial(folder)
    results = [folder / name for name in RESULTS if (folder / name).exists()]
    if everything:
        results += checkpoints(folder)
        logs = [folder / name for name in LOGS]
        if results or _replaced(folder):
            results += [path for path in logs if path.exists()]
        else:
            for path in logs:
                _delete(path)
    for path in results:
        path.rename(_free(path))


def clear_partial(folder: Path) -> None:
    """Delete what a killed run had begun to write or to delete."""
    clear_leftovers(folder)
    for name in PARTIAL:
        _delete(folder / name)


def discard_replaced(folder: Path) -> None:
    """Delete what ``set_aside`` has moved."""
    for path in _replaced(folder):
        shutil.rmtree(path, ignore_errors=True)


def _replaced(folder: Path) -> list[Path]:
    found = [path for path in folder.glob(f"{REPLACED}*") if _REPLACED.fullmatch(path.name)]
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _free(path: Path) -> Path:
    """Where to move ``path``: the first of the folders that has no entry of its name."""
    count = 1
    while True:
        folder = path.with_name(REPLACED if count == 1 else f"{REPLACED}-{count}")
        mine = folder.is_dir() and not folder.is_symlink()
        if not (os.path.lexists(folder / path.name) if mine else os.path.lexists(folder)):
            folder.mkdir(exist_ok=True)
            return folder / path.name
        count += 1


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
