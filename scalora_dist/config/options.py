"""All options of a run: one dataclass for each group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from scalora_dist.config.data import DataArguments
from scalora_dist.config.fields import option
from scalora_dist.config.method import MethodArguments
from scalora_dist.config.model import ModelArguments
from scalora_dist.config.profile import ProfileArguments
from scalora_dist.config.training import TrainArguments
from scalora_dist.errors import UserError


@dataclass
class LaunchArguments:
    _argument_group_name = "launch"

    config: Optional[str] = option(
        None, "A YAML file of these options; the command line overrides it."
    )
    ds_config: Optional[str] = option(
        None, "Train under DeepSpeed with this JSON, e.g. ds_configs/zero3.json."
    )
    fsdp: bool = option(False, "Train under FSDP2 (start with torchrun).")
    fsdp_config: Optional[str] = option(None, "FSDP2's settings, JSON or YAML.")
    dry_run: bool = option(
        False, "Print what the run will need (as tools/plan.py), and end; loads no weights."
    )
    local_rank: int = option(-1, "Set by the launcher.")


@dataclass
class Options:
    model: ModelArguments
    data: DataArguments
    method: MethodArguments
    train: TrainArguments
    launch: LaunchArguments
    profile: ProfileArguments = field(default_factory=ProfileArguments)

    def __post_init__(self) -> None:
        """Check options of different groups against each other.

        Raises:
            UserError: ``--sb_eta code`` without ``--warmup_ratio``.
        """
        if self.method.sb_eta == "code" and not self.train.warmup_ratio:
            raise UserError(
                "--sb_eta code is a learning rate of the warm-up: set --warmup_ratio, or leave "
                "--sb_eta out"
            )
