"""Finds the configs that come with the project."""

from __future__ import annotations

from pathlib import Path

import scalora_dist
from scalora_dist.errors import UserError

DS_CONFIGS = "ds_configs"


def shipped_ds_config(name: str) -> Path:
    """Path of a DeepSpeed config of the checkout, such as "zero3.json".

    Raises:
        UserError: the package was installed without them.
    """
    path = Path(scalora_dist.__file__).parents[1] / DS_CONFIGS / name
    if not path.is_file():
        raise UserError(f"{DS_CONFIGS}/{name} is not there: run from a checkout of the project")
    return path
