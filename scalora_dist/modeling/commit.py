"""Finds the commit of a hub's model, so that all ranks read the same files of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2
from transformers import PreTrainedConfig

from scalora_dist.config.model import ModelArguments
from scalora_dist.distributed.world import World


def at_commit(args: ModelArguments, world: World) -> ModelArguments:
    """The options with the commit that ``model_revision`` is at now, on rank 0. A collective.

    A branch may move while the ranks start. These options are for reading the model alone: a run
    records the name and revision that the user gave.

    Returns:
        ``args`` themselves for a folder, and where the commit cannot be found: then reading the
        model fails, too, and says why.
    """
    commit = world.from_main(lambda: _commit(args))
    return replace(args, model_revision=commit) if commit else args


def _commit(args: ModelArguments) -> str:
    name = str(args.model_name_or_path)
    if not Path(name).is_dir():
        with suppress(OSError, ValueError, HTTPError):
            config, _ = PreTrainedConfig.get_config_dict(name, revision=args.source["revision"])
            return config.get("_commit_hash") or ""
    return ""
