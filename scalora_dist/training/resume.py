"""Finds the checkpoint to resume from, and checks that the run may write its output."""

from __future__ import annotations

from pathlib import Path

from scalora_dist.checkpoint.manifest import step_of
from scalora_dist.checkpoint.run_state import check_no_newer, check_same_run, find_checkpoint
from scalora_dist.checkpoint.storage import Checkpoints
from scalora_dist.config.options import Options
from scalora_dist.errors import UserError
from scalora_dist.training.output_dir import check_inputs, check_output_dir
from scalora_dist.training.phases import interrupted_start
from scalora_dist.training.saving import check_shared


def checkpoint_to_resume(checkpoints: Checkpoints, options: Options) -> Path | None:
    """The checkpoint that the run resumes from, or None: start at the beginning. A collective.

    Raises:
        UserError: on every rank, where there is no such checkpoint, where it is another run's, or
            where ``output_dir`` is not empty, has newer checkpoints, holds what the run reads, or
            is not shared by all nodes.
    """
    train, world = options.train, checkpoints.world
    output_dir, wanted = checkpoints.output_dir, train.resume_from_checkpoint
    check_shared(checkpoints, train)
    world = checkpoints.world
    if wanted == "latest" and world.json_from_rank_0(lambda: interrupted_start(output_dir)):
        wanted = None  # the checkpoints there are an earlier run's
    folder = find_checkpoint(checkpoints, wanted)
    elsewhere = None if goes_on_in(folder, output_dir) else folder
    world.main_only(lambda: check_inputs(output_dir, options, elsewhere))
    if folder is None or elsewhere:
        world.main_only(lambda: check_output_dir(output_dir, train))
    if folder is None:
        return None
    world.main_only(lambda: check_same_run(folder, options))
    if train.resume_from_checkpoint != "latest":  # with latest, newer ones are damaged
        found = checkpoints.newest_first()
        world.main_only(lambda: check_no_newer(folder, output_dir, found))
    return folder


def goes_on_in(checkpoint: Path | None, output_dir: Path) -> bool:
    """Whether a run that resumes from ``checkpoint`` goes on in the folder that it began in."""
    return checkpoint is not None and checkpoint.parent.resolve() == output_dir.resolve()


def check_not_beyond(checkpoint: Path, steps: int) -> None:
    """Check that a checkpoint is not from after the run's end. Only reads: no collective.

    Args:
        steps: number of steps of the whole run.

    Raises:
        UserError: the checkpoint has more steps.
    """
    if (step_of(checkpoint) or 0) > steps:
        raise UserError(
            f"{checkpoint} is beyond this run's {steps} step(s): raise --max_steps or "
            "--num_train_epochs, or name an earlier checkpoint and another --output_dir"
        )
