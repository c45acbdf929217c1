"""Uploads what a run leaves to a hub, after everything is on the disk."""

from __future__ import annotations

from pathlib import Path

from scalora_dist.checkpoint.storage import Checkpoints
from scalora_dist.config.options import Options
from scalora_dist.errors import UserError
from scalora_dist.methods.registry import writes_adapter
from scalora_dist.model_io.hub import check_hub
from scalora_dist.model_io.hub import upload as push_folder


def prepare_upload(options: Options, checkpoints: Checkpoints) -> str | None:
    """Make the repository that the run uploads to. A collective, before the model is loaded.

    Args:
        options: the options after ``resolve``.

    Returns:
        account/name on every rank. None: nothing is uploaded.

    Raises:
        UserError: on every rank, where the run leaves nothing to upload, or the hub refuses.
    """
    hub, world = options.hub, checkpoints.world
    if not hub.push_to_hub:
        return None
    if not options.train.save_model and not writes_adapter(options):
        raise UserError(
            f"--push_to_hub has nothing to upload: this --method {options.method.name} writes no "
            "adapter: leave --save_model false out, or set --adapter_rank if it merges into W"
        )
    name = hub.repository(checkpoints.output_dir)
    private, adapter = hub.hub_private_repo, not options.train.save_model
    found = world.main_only(lambda: check_hub(name, private=private, adapter=adapter))
    return world.json_from_rank_0(lambda: found)


def upload(folder: Path, repository: str, options: Options, *, resumable: bool) -> None:
    """Upload ``model/`` of a run, or without it ``adapter/``. Rank 0 only.

    Args:
        folder: the run's ``output_dir``, with all results.
        repository: account/name.
        options: the options of the run.
        resumable: whether a resume of this run repeats only the upload.

    Raises:
        UserError: not all files are uploaded. It says how to repeat the upload.
    """
    sent = folder / ("model" if options.train.save_model else "adapter")
    again = "the same command with --resume_from_checkpoint latest repeats only the upload"
    push_folder(
        sent,
        repository,
        f"Train with scalora ({options.method.name})",
        private=options.hub.hub_private_repo,
        again=again if resumable else None,
    )
