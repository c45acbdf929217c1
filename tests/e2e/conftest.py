from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import runs


@pytest.fixture(scope="session")
def tiny_model(demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random Llama with the demo model's tokenizer."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    runs.save_tiny_llama(folder, AutoTokenizer.from_pretrained(demo_model))
    return str(folder)
