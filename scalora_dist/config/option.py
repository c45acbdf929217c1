"""Declares an option in one place: its help, default, bounds, readers and resume rule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional, TypeAlias

from scalora_dist.errors import UserError

# May a resumed run have another value? fixed: no, the checkpoint means something else under it;
# warned: yes, and the user is told, since the numbers may change; free: yes, the numbers stay the
# same, to rounding.
ResumeRule: TypeAlias = Literal["fixed", "warned", "free"]


@dataclass(frozen=True)
class Bounds:
    """The finite numbers that an option may have. None: no bound on that side."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """For example "at least 0, less than 1"; empty without bounds."""
        if self == Bounds(above=0):
            return "a positive number"
        words = {
            "at least": self.at_least,
            "more than": self.above,
            "at most": self.at_most,
            "less than": self.below,
        }
        return ", ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)


@dataclass(frozen=True)
class Declaration:
    """What an option's dataclass field carries beside its name, type and default.

    Attributes:
        help: one or two sentences, as ``--help`` and docs/options.md print them.
        resume: whether a resumed run may have another value.
        bounds: of a number, or of each number of a list.
        methods: names of the methods that read it; None: all do.
    """

    help: str
    resume: ResumeRule
    bounds: Bounds
    methods: frozenset[str] | None

    def read_by(self, method: str) -> bool:
        return self.methods is None or method in self.methods

    def check(self, name: str, value: Any) -> None:
        """Check the value of the option ``name``, or each number of a list, against the bounds.

        Raises:
            UserError: a number is out of them.
        """
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not self.bounds.hold(number):
                wanted = str(self.bounds) or "a finite number"
                raise UserError(f"--{name} {number}: set {wanted}")


def option(
    default: Any,
    help: str,
    *,
    resume: ResumeRule,
    methods: frozenset[str] | None = None,
    **bounds: float,
) -> Any:
    """Declare an option as a dataclass field.

    Args:
        default: a list is copied for each dataclass.
        help: argparse reads it, so a percent sign is written twice.
        bounds: the fields of `Bounds`.
    """
    declaration = Declaration(help, resume, Bounds(**bounds), methods)
    metadata = {"help": _explained(declaration), "declaration": declaration}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def tool_option(default: Any, help: str, **bounds: float) -> Any:
    """Declare an option of a plan or a tool, which no checkpoint remembers."""
    return option(default, help, resume="free", methods=None, **bounds)


def _explained(declaration: Declaration) -> str:
    """The help with what else the declaration says, for ``--help``."""
    text = declaration.help
    if bounds := str(declaration.bounds):
        text += f" {bounds.capitalize()}."
    if declaration.methods is not None and len(declaration.methods) <= 3:
        text += f" Methods: {', '.join(sorted(declaration.methods))}."
    return text


def declarations(group: Any) -> Iterator[tuple[Field[Any], Declaration]]:
    """The options of a dataclass or of an instance of it, in order."""
    for each in fields(group):
        yield each, each.metadata["declaration"]


def declaration_of(group: Any, name: str) -> Declaration:
    """The declaration of an option of a dataclass.

    Raises:
        KeyError: the dataclass has no such option.
    """
    return {each.name: declaration for each, declaration in declarations(group)}[name]


def default_of(each: Field[Any]) -> Any:
    return each.default_factory() if callable(each.default_factory) else each.default


@dataclass(frozen=True)
class Group:
    """Base of the dataclasses that hold options: frozen, and within their bounds."""

    _argument_group_name: ClassVar[str]  # the title in --help

    def __post_init__(self) -> None:
        """Check every option against its bounds.

        Raises:
            UserError: the first option that is out of them.
        """
        for each, declaration in declarations(self):
            declaration.check(each.name, getattr(self, each.name))


@dataclass(frozen=True)
class JsonFile(Group):
    """Base of the options of a plan or a tool that can write its figures to a file."""

    json: Optional[str] = tool_option(None, "A file to write the figures to.")

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: as in ``Group``, or the file's folder does not exist.
        """
        super().__post_init__()
        if self.json and not Path(self.json).parent.is_dir():
            raise UserError(f"--json {self.json}: its folder does not exist")
