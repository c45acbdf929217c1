"""Checks that a run may write to its output folder, and clears the results of earlier runs."""

from __future__ import annotations

import shutil
from pathlib import Path

from scalora_dist.checkpoint.manifest import clear_leftovers, prune
from scalora_dist.config.training import TrainArguments
from scalora_dist.errors import UserError
from scalora_dist.training.saving import PREEMPTED


def check_output_dir(folder: Path, train: TrainArguments) -> None:
    """Refuse to write into a folder that has content.

    An exception: if the earlier run left a metrics.jsonl but no results, a run with
    ``resume_from_checkpoint`` latest may overwrite it. It died before its first checkpoint.

    Raises:
        UserError: ``folder`` is a file, or is not empty and ``overwrite_output_dir`` is not set.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file: name a folder")
    done = any((folder / name).exists() for name in ("summary.json", "adapter", "model"))
    begun = (folder / "metrics.jsonl").is_file() and not done
    resumes = train.resume_from_checkpoint == "latest" and begun
    empty = not folder.is_dir() or not any(folder.iterdir())
    if not (empty or resumes or train.overwrite_output_dir):
        raise UserError(
            f"--output_dir {folder} is not empty: name another, or give --overwrite_output_dir"
        )


def clear_results(folder: Path) -> None:
    """Delete the results and checkpoints of an earlier run, so that none mix with this run's."""
    for name in ("metrics.jsonl", "summary.json", PREEMPTED):
        (folder / name).unlink(missing_ok=True)
    for name in ("tensorboard", "profile", "adapter", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    clear_leftovers(folder)
    prune(folder, keep=0)
