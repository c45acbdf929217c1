"""The number of cores and threads of a rank."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from scalora_dist.distributed import cores as module
from scalora_dist.distributed import world
from scalora_dist.distributed.cores import cores
from tests.support import tiny_runs


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 8),  # no cgroups of version 2
        ({"": "max 100000", "pod": "max 100000"}, 8),
        ({"pod/run": "250000 100000"}, 2),
        ({"": "max 100000", "pod": "300000 100000", "pod/run": "max 100000"}, 3),
        ({"pod/run": "50000 100000"}, 1),
        ({"pod/run": "6400000 100000"}, 8),
    ],
)
def test_a_quota_counts(
    limits: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, limit in limits.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "cpu.max").write_text(f"{limit}\n")
    (tmp_path / "own").write_text("1:name=systemd:/other\n0::/pod/run\n")
    monkeypatch.setattr(module, "CGROUPS", tmp_path)
    monkeypatch.setattr(module, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cores() == expected


@pytest.mark.parametrize(
    ("environment", "threads", "warned"),
    [
        ({"LOCAL_SIZE": "2", "WORLD_SIZE": "4"}, 4, 0),
        ({"WORLD_SIZE": "16"}, 1, 0),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, None, 0),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, None, 1),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}, None, 0),
        ({"LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, None, 0),
    ],
)
def test_a_ranks_threads(
    environment: dict[str, str],
    threads: int | None,
    warned: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"RANK": "0", "WORLD_SIZE": "8"} | environment).items():
        monkeypatch.setenv(name, value)
    seen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(world, "cores", lambda: 8)
    with tiny_runs.warnings_of() as heard:
        world._set_threads(on_cpu=True)
    assert seen == ([] if threads is None else [threads])
    assert len(heard) == warned and all("OMP_NUM_THREADS=4" in line for line in heard)
