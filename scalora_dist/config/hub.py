"""Options of a Hugging Face hub: where the results are uploaded to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from scalora_dist.config.option import Group, option
from scalora_dist.errors import UserError


@dataclass(frozen=True)
class HubArguments(Group):
    """The names are those of transformers' TrainingArguments. No option holds a token."""

    _argument_group_name = "hub"

    push_to_hub: bool = option(
        False,
        "At the end, upload the merged model to the hub, or the adapter where no model is written; "
        "the token is that of HF_TOKEN or of `hf auth login`.",
        resume="free",
    )
    hub_model_id: Optional[str] = option(
        None,
        "Repository to upload to: a name in the token's account, or account/name; by default the "
        "name of the folder that is written.",
        resume="free",
    )
    hub_private_repo: bool = option(
        True,
        "Make the repository private; one that exists stays as it is.",
        resume="free",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_to_hub:
            return
        for name, given in (
            ("hub_model_id", self.hub_model_id is not None),
            ("hub_private_repo", not self.hub_private_repo),
        ):
            if given:
                raise UserError(f"--{name} is --push_to_hub's: set that too, or leave it out")

    def repository(self, folder: Path) -> str:
        """The repository that is uploaded to: ``hub_model_id``, or the name of ``folder``."""
        return self.hub_model_id or folder.absolute().name
