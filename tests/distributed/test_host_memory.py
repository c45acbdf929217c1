"""The memory of the host that a rank may still use."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from scalora_dist.distributed import cores
from scalora_dist.distributed.host_memory import available_bytes


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 1000),  # no cgroups of version 2
        ({"": "max", "pod/run": "max"}, 1000),
        ({"pod": "700"}, 700 - 300 + 40),
        ({"pod": "700", "pod/run": "500"}, 500 - 300 + 40),
        ({"pod/run": "5000"}, 1000),
        ({"pod/run": "100"}, 0),
    ],
)
def test_a_limit_counts(
    limits: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, limit in limits.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
        (tmp_path / folder / "memory.current").write_text("300\n")
        (tmp_path / folder / "memory.stat").write_text("anon 200\ninactive_file 40\nfile 90\n")
    (tmp_path / "own").write_text("0::/pod/run\n")
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert available_bytes() == expected


def test_a_limit_of_cgroups_of_version_1_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "memory" / "slurm" / "job"
    group.mkdir(parents=True)
    for folder, limit in ((group, 2**63 - 4096), (group.parent, 700)):  # no limit, and one
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text("300\n")
        (folder / "memory.stat").write_text("cache 90\ntotal_inactive_file 40\n")
    (tmp_path / "own").write_text("5:cpu,cpuacct:/slurm/job\n4:memory:/slurm/job\n")
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert available_bytes() == 700 - 300 + 40
