"""Helpers of the option dataclasses: a field with its help text, and checks of bounds."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

from scalora_dist.errors import UserError


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def check_at_least(args: Any, least: int, *names: str) -> None:
    for name in names:
        if not least <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: set at least {least}")


def check_positive(args: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: set a positive number")
