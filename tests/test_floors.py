"""floors.txt pins the lowest versions that pyproject.toml allows (make test-floors)."""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).parents[1]
GPU_ONLY = {"flash-attn", "liger-kernel"}  # not installed by make test-floors


def the_version(requirement: Requirement, operator: str) -> Version:
    (version,) = [x.version for x in requirement.specifier if x.operator == operator]
    return Version(version)


def pins() -> dict[str, Version]:
    """{package: version} of the part of floors.txt that pyproject.toml decides."""
    chosen, _, _ = (REPOSITORY / "floors.txt").read_text().partition("\n# What they bring")
    lines = [line.partition("#")[0].strip() for line in chosen.splitlines()]
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(x.name): the_version(x, "==") for x in found}


def test_every_floor_is_pinned() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    floors: dict[str, Version] = {}
    for requirement in (Requirement(text) for group in groups for text in group):
        name, version = canonicalize_name(requirement.name), the_version(requirement, ">=")
        if name not in GPU_ONLY:
            assert floors.setdefault(name, version) == version, f"{name} has two floors"
    assert floors == pins()


@pytest.mark.floors
@pytest.mark.skipif(Path(sys.prefix).name != ".venv-floors", reason="for make test-floors")
def test_the_floors_are_installed() -> None:
    # Without what a build of torch adds, as in 2.12.0+cpu.
    assert {name: Version(Version(metadata.version(name)).public) for name in pins()} == pins()
