"""``scalora export``: writes the model or the adapter of a checkpoint, in one process."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import torch

from scalora_dist.checkpoint.command import all_faults, find
from scalora_dist.checkpoint.manifest import read_manifest
from scalora_dist.config.hub import HubArguments
from scalora_dist.config.option import Group, tool_option
from scalora_dist.config.words import Parser
from scalora_dist.errors import UserError
from scalora_dist.export.trained import Trained
from scalora_dist.model_io.hub import check_hub, upload
from scalora_dist.model_io.whole_folder import aside_of

DESCRIPTION = """Write the model or the adapter of a checkpoint of any engine and number of ranks.
CHECKPOINT is a folder checkpoint-<step>, or a run's output_dir: then its newest sound checkpoint is
taken. It needs one process, no GPU, the base model, and not the data of the training.
docs/export.md says more, and which runs have an adapter."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportArguments(Group):
    _argument_group_name = "export"

    output: Optional[str] = tool_option(None, "The folder to write, which does not exist yet.")
    adapter: bool = tool_option(False, "Write the adapter, not the model.")
    adapter_rank: Optional[int] = tool_option(
        None,
        "Write what was merged into W as an adapter, its best approximation of this rank.",
        at_least=1,
    )
    dtype: Optional[Literal["float32", "bfloat16", "float16"]] = tool_option(
        None, "Dtype of the weights; by default the training's, and float32 for an adapter."
    )
    model_name_or_path: Optional[str] = tool_option(
        None, "The base model, if it is not where the training found it."
    )
    trust_remote_code: bool = tool_option(
        False, "Run the base model's own Python code. What the checkpoint says does not count."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output:
            raise UserError("--output is missing: name the folder to write")
        if os.path.lexists(self.output):
            raise UserError(f"--output {self.output} is there already: name another folder")
        if os.path.lexists(aside := aside_of(Path(self.output))):
            raise UserError(f"{aside} is there already: delete it, or name another --output")


def export_command(words: Sequence[str]) -> None:
    """Export from a checkpoint.

    Args:
        words: the checkpoint and the options.

    Raises:
        UserError: a mistake in the options, a damaged checkpoint, another base model, a full disk,
            a hub that refuses.
    """
    parser = Parser(
        [ExportArguments, HubArguments],
        allow_abbrev=False,
        prog="scalora export",
        usage="scalora export CHECKPOINT --output FOLDER [--adapter] [--option value ...]",
        description=DESCRIPTION,
    )
    if not words or (words[0].startswith("-") and not {"-h", "--help"} & set(words)):
        raise UserError(
            "scalora export: name a checkpoint, or the output_dir of a run, before the options"
        )
    args, hub = parser.parse_args_into_dataclasses([*words[not words[0].startswith("-") :]])
    folder, checkpoint = Path(args.output), sound(Path(words[0]))
    if checkpoint.resolve() in folder.resolve().parents:
        raise UserError(f"--output {folder} is in the checkpoint itself: name another folder")
    trained = Trained(checkpoint, args.model_name_or_path, args.trust_remote_code)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    adapter = args.adapter or args.adapter_rank is not None
    repository = None
    if hub.push_to_hub:
        name = hub.repository(folder)
        repository = check_hub(name, private=hub.hub_private_repo, adapter=adapter)
    try:
        if adapter:
            trained.write_adapter(folder, args.adapter_rank, dtype)
        else:
            trained.write_model(folder, dtype)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error.strerror or error}") from error
    print(f"{folder} is written, from {checkpoint}")
    if repository:
        upload(folder, repository, "Export with scalora", private=hub.hub_private_repo)


def sound(named: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest sound one of a run. Reads its files.

    Raises:
        UserError: none is there, or none is sound.
    """
    newest, others = find(named)
    for folder in (newest, *others):
        found = all_faults(folder, read_manifest(folder))
        if not found:
            return folder
        logger.warning("%s cannot be used: %s", folder, "; ".join(found))
    raise UserError(f"{named} has no sound checkpoint: name another")
