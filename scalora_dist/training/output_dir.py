"""The folder that a run writes to: refused where there is something already, or cleared."""

from __future__ import annotations

import shutil
from pathlib import Path

from scalora_dist.checkpoint.manifest import clear_leftovers, prune
from scalora_dist.config.training import TrainArguments
from scalora_dist.errors import UserError
from scalora_dist.training.saving import PREEMPTED


def check_output_dir(folder: Path, train: TrainArguments) -> None:
    """Refuse to write where there is something already.

    Raises:
        UserError: ``folder`` is a file, or not empty without ``overwrite_output_dir``; what a run
            left that died before its first checkpoint may be overwritten by one that would resume.
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
    """Remove what an earlier run left, so that nothing of it stands beside ours."""
    for name in ("metrics.jsonl", "summary.json", PREEMPTED):
        (folder / name).unlink(missing_ok=True)
    for name in ("tensorboard", "profile", "adapter", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    clear_leftovers(folder)
    prune(folder, keep=0)
