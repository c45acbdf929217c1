"""A model of a hub: the commit that all ranks read, and the download of its weights."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from huggingface_hub import resolve_revision
from transformers import AutoConfig
from transformers.utils import GENERATION_CONFIG_NAME

from scalora_dist.config.model import ModelArguments
from scalora_dist.distributed.world import World
from scalora_dist.modeling.base_files import base_file, weight_files
from scalora_dist.modeling.load import known_model


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

    def find() -> str | None:
        if not Path(name).is_dir():
            with suppress(Exception):  # those of the hub have no common base
                return resolve_revision(name, revision=revision).resolved
        return None

    return world.json_from_rank_0(find)


def fetch_weights(args: ModelArguments) -> None:
    """Download what ``load_model`` reads with weights, if the model is one of the hub.

    Raises:
        UserError: the model cannot be downloaded.
    """
    with known_model(args) as name:
        if not Path(name).is_dir():
            config = AutoConfig.from_pretrained(name, **args.source)
            weight_files(args, getattr(config, "transformers_weights", None))
            base_file(args, GENERATION_CONFIG_NAME)
