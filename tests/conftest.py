from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.support import ranks as ranks_module
from tests.support import tiny_models
from tests.support.ranks import Ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpus",
        type=int,
        help="run the tests marked gpu, on at most this many ranks, each on a GPU of its own",
    )


def pytest_configure(config: pytest.Config) -> None:
    ranks_module.GPUS = config.getoption("gpus")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("gpus"):
        chosen = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """``ranks(size)``: that many real ranks, started once per test run.

    On GPUs also after a failure: a CUDA error makes all later calls of its process fail.
    """
    started: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size > ranks_module.most_ranks(size):
            pytest.skip(f"needs {size} GPUs")
        if ranks_module.on_gpus() and size in started and started[size].failed:
            started.pop(size).close()
        if size not in started:
            started[size] = Ranks(size)
        return started[size]

    yield get
    for group in started.values():
        group.close()


@pytest.fixture(scope="session")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the project's wheel installs, beside no clone."""
    folder: Path = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.fixture(scope="session")
def demo_model() -> str:
    """The folder of SmolLM2-135M-Instruct, converted on first use."""
    command = [sys.executable, str(Path(__file__).parents[1] / "tools" / "demo_model.py")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


@pytest.fixture(scope="session")
def tiny_model(demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random Llama with the demo model's tokenizer."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    tiny_models.save_tiny_llama(folder, AutoTokenizer.from_pretrained(demo_model))
    return str(folder)
