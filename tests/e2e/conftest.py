from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import tiny_models


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows divide by nothing."""
    return tiny_models.save_task(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that bitsandbytes' own layers can compute with, too."""
    from tests.support.workers.adapter import save_even_task  # which imports PEFT

    return save_even_task(tmp_path_factory.mktemp("even"))
