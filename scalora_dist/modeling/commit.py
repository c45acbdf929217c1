"""Finds the commit of a hub's repository, so that all ranks read the same files of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from huggingface_hub import resolve_revision

from scalora_dist.config.model import ModelArguments
from scalora_dist.distributed.world import World


def at_commit(args: ModelArguments, world: World) -> ModelArguments:
    """The options with the commit that ``model_revision`` is at now, on rank 0. A collective.

    They are for reading the model alone: a run records the name and revision that the user gave.
    """
    commit = commit_of(str(args.model_name_or_path), args.model_revision, world)
    return replace(args, model_revision=commit) if commit else args


def commit_of(name: str, revision: str | None, world: World) -> str | None:
    """The commit that a revision is at now, on rank 0. A collective.

    A branch may move while the ranks start. Files of a commit that are in the cache are read
    without asking the hub.

    Args:
        name: a model of the hub, or a folder.
        revision: branch, tag or commit; None: the main branch.

    Returns:
        None for a folder, and where the commit cannot be found: then reading the files fails, too,
        and says why.
    """

    def find() -> str:
        if not Path(name).is_dir():
            with suppress(Exception):  # those of the hub have no common base
                return resolve_revision(name, revision=revision).resolved
        return ""

    return world.from_main(find) or None
