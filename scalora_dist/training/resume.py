"""Finds the checkpoint to resume from, and checks that the run may write its output."""

from __future__ import annotations

from pathlib import Path

from scalora_dist.checkpoint.run_state import check_no_newer, check_same_run, find_checkpoint
from scalora_dist.checkpoint.storage import Checkpoints
from scalora_dist.config.options import Options
from scalora_dist.training.output_dir import check_output_dir
from scalora_dist.training.saving import check_shared


def checkpoint_to_resume(checkpoints: Checkpoints, options: Options) -> Path | None:
    """The checkpoint that the run resumes from, or None: start at the beginning. A collective.

    Raises:
        UserError: on every rank, where there is no such checkpoint, where it is another run's, or
            where ``output_dir`` is not empty, has newer checkpoints, or is not shared by all nodes.
    """
    train, world = options.train, checkpoints.world
    check_shared(checkpoints, train)
    folder = find_checkpoint(checkpoints, train.resume_from_checkpoint)
    output_dir = checkpoints.output_dir
    if folder is None or folder.parent.resolve() != output_dir.resolve():
        world.main_only(lambda: check_output_dir(output_dir, train))
    if folder is None:
        return None
    world.main_only(lambda: check_same_run(folder, options))
    if train.resume_from_checkpoint != "latest":  # with latest, newer ones are damaged
        found = checkpoints.newest_first()
        world.main_only(lambda: check_no_newer(folder, output_dir, found))
    return folder
