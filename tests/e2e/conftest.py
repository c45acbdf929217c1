from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import tiny_models, tiny_runs
from tests.support.ranks import Ranks


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows divide by nothing."""
    return tiny_models.save_task(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that bitsandbytes' own layers can compute with, too."""
    from tests.support.workers.adapter import save_even_task  # which imports PEFT

    return save_even_task(tmp_path_factory.mktemp("even"))


@pytest.fixture(scope="module")
def saved(
    ranks: Callable[[int], Ranks], task: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, str], Path]:
    """``saved(size, engine)``: the folder of a run of 8 steps with a checkpoint at step 4."""
    made: dict[tuple[int, str], Path] = {}

    def get(size: int, engine: str) -> Path:
        if (size, engine) not in made:
            folder = made[size, engine] = tmp_path_factory.mktemp("saved") / "run"
            ranks(size).run(tiny_runs.train, tiny_runs.steady(task, folder, engine))
        return made[size, engine]

    return get
