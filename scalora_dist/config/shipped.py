"""The configs that come with the project."""

from __future__ import annotations

from pathlib import Path

import scalora_dist

DS_CONFIGS = "ds_configs"


def shipped_ds_config(name: str) -> Path | None:
    """A DeepSpeed config of the checkout, such as "zero3.json". None: there is no checkout."""
    path = Path(scalora_dist.__file__).parents[1] / DS_CONFIGS / name
    return path if path.is_file() else None
