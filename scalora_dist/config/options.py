"""All options of a run: one dataclass for each group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Optional, get_type_hints

from scalora_dist.config.data import DataArguments
from scalora_dist.config.hub import HubArguments
from scalora_dist.config.method import MethodArguments
from scalora_dist.config.model import ModelArguments
from scalora_dist.config.option import Group, option
from scalora_dist.config.profile import ProfileArguments
from scalora_dist.config.training import TrainArguments
from scalora_dist.errors import UserError


@dataclass(frozen=True)
class LaunchArguments(Group):
    _argument_group_name = "launch"

    config: Optional[str] = option(
        None,
        "A YAML file of these options, or a shipped recipe such as demo; the command line "
        "overrides it.",
        resume="free",
    )
    ds_config: Optional[str] = option(
        None,
        "Train under DeepSpeed with this JSON file, or a shipped one such as zero3.",
        resume="free",
    )
    fsdp: bool = option(False, "Train under FSDP2 (start with torchrun).", resume="free")
    fsdp_config: Optional[str] = option(
        None,
        "FSDP2's settings: a JSON or YAML file, or a shipped one such as hybrid.",
        resume="free",
    )
    dry_run: bool = option(
        False,
        "Print what the run will need (as scalora plan), and end; loads no weights, and no data "
        "without `show_examples`.",
        resume="free",
    )
    local_rank: int = option(-1, "Set by the launcher.", resume="free")


@dataclass(frozen=True)
class Options:
    """All options of a run, frozen.

    `training.resolve.resolve` gives those that the whole run keeps.
    """

    model: ModelArguments
    data: DataArguments
    method: MethodArguments
    train: TrainArguments
    launch: LaunchArguments
    profile: ProfileArguments = field(default_factory=ProfileArguments)
    hub: HubArguments = field(default_factory=HubArguments)

    def having(self, **values: Any) -> Options:
        """A copy with other values of some options, by name, whichever group they are in.

        Raises:
            TypeError: there is no option of such a name.
        """
        changed = {}
        for group in fields(self):
            old = getattr(self, group.name)
            own = [each.name for each in fields(old) if each.name in values]
            changed[group.name] = replace(old, **{name: values.pop(name) for name in own})
        if values:
            raise TypeError(f"no such option: {', '.join(values)}")
        return replace(self, **changed)

    @classmethod
    def saved(cls, groups: Mapping[str, Mapping[str, Any]]) -> Options:
        """The options that a checkpoint's state.json holds.

        Args:
            groups: {group: {option: value}}. An option that this version does not know is left out;
                one that is not there has its default.

        Raises:
            UserError: a value is out of its bounds.
            TypeError: a value has another type.
        """
        made = {}
        for name, group in get_type_hints(cls).items():
            known = {each.name for each in fields(group)}
            values = groups.get(name, {})
            made[name] = group(**{k: v for k, v in values.items() if k in known})
        return cls(**made)

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


# The dataclasses of all options, in the order of the fields of `Options`.
GROUPS: tuple[type[Group], ...] = tuple(get_type_hints(Options).values())
