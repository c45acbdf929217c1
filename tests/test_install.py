"""The wheel, a clone without an install, and what a user types first in both."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scalora_dist.cli import LIBRARIES

REPOSITORY = Path(__file__).parents[1]
# {folder of the wheel: folder of the checkout}
FOLDERS = {
    "scalora_dist": "scalora_dist",
    "scalora_dist/shipped/ds_configs": "ds_configs",
    "scalora_dist/shipped/recipes": "launch/recipes",
    "scalora_dist/shipped/fsdp": "launch/fsdp",
}


def contents(folder: Path) -> dict[str, bytes]:
    """{path in the folder: content} of all files, but for compiled ones."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def bare_python(*words: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python with its standard library and the folder ``path``, and nothing that pip installed."""
    return subprocess.run(
        [sys.executable, "-S", *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.floors
def test_the_wheel_is_the_package_and_what_is_shipped(unpacked_wheel: Path) -> None:
    expected = {
        f"{target}/{name}": data
        for target, source in FOLDERS.items()
        for name, data in contents(REPOSITORY / source).items()
    }
    found = contents(unpacked_wheel)
    (info,) = unpacked_wheel.glob("*.dist-info")
    about = {name: found.pop(name) for name in [*found] if name.startswith(info.name)}
    assert found == expected
    assert b"scalora = scalora_dist.cli:main" in about[f"{info.name}/entry_points.txt"]
    assert f"{info.name}/licenses/LICENSE" in about


def test_the_wheel_shows_its_usage(unpacked_wheel: Path, tmp_path: Path) -> None:
    done = bare_python("-m", "scalora_dist", "--help", path=unpacked_wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: scalora COMMAND")


@pytest.mark.parametrize("missing", ["scalora_dist", "torch"])
def test_a_clone_without_an_install_says_what_to_do(tmp_path: Path, missing: str) -> None:
    train = REPOSITORY / "launch" / "train.py"
    path = tmp_path if missing == "scalora_dist" else REPOSITORY
    done = bare_python(str(train), "--config", "demo", path=path, cwd=tmp_path)
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("error: ")
    assert missing in sentence
    assert "make setup" in sentence


def test_all_dependencies_are_looked_for() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    packages = metadata.packages_distributions()
    found = {canonicalize_name(name) for module in LIBRARIES for name in packages[module]}
    assert found == needed
