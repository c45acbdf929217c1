"""Versions, devices, memory, links and clocks that make trouble."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scalora_dist.doctor import machine
from scalora_dist.doctor.finding import Finding
from scalora_dist.doctor.machine import GIB, Machine
from tests.support.workers import doctor as work

NODE = Machine(
    host="node1",
    versions={"torch": "2.13.0"},
    device="NVIDIA H100 80GB HBM3",
    unique="a",
    free=78 * GIB,
    total=79 * GIB,
    host_free=900 * GIB,
    host_total=1000 * GIB,
    shm_free=500 * GIB,
    infiniband=["mlx5_0"],
    peers=True,
    gpu=True,
)


def test_a_rank_with_another_library_is_named(ranks: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "deepspeed-9.9.9.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: deepspeed\nVersion: 9.9.9\n"
    (other / "deepspeed-9.9.9.dist-info" / "METADATA").write_text(metadata)
    assert not ranks(2).run(work.versions, [tmp_path, tmp_path])[0].failed
    for found in ranks(2).run(work.versions, [tmp_path, other]):
        assert found.failed and "on rank 1 (" in found.found
        assert found.found.endswith("): deepspeed 9.9.9")


def test_clocks_that_are_apart_are_told(ranks: Any) -> None:
    assert ranks(2).run(work.clocks, [0, 0])[0].advice is None
    found = ranks(2).run(work.clocks, [0, -100])[1]
    assert found.found.startswith("within 100.") and "NTP" in str(found.advice)
    assert not found.failed, "only a warning"


@pytest.mark.parametrize(
    ("compare", "change", "fatal", "says"),
    [
        (machine.compare_devices, {"unique": "a"}, True, "ranks 0 and 1 have the same GPU"),
        (machine.compare_devices, {"device": "A100"}, False, "the slowest kind"),
        (machine.compare_devices, {"triton": "no gcc"}, False, "on node2 (no gcc) install triton"),
        (machine.compare_memory, {"free": 40 * GIB}, False, "nvidia-smi shows what"),
        (machine.compare_memory, {"host_free": GIB}, False, "the memory of node2"),
        (machine.compare_memory, {"shm_free": 2**26}, False, "--shm-size"),
        (machine.compare_links, {"peers": False}, False, "nvidia-smi topo -m"),
    ],
)
def test_a_second_node_that_makes_trouble(
    compare: Callable[[list[Machine]], Finding], change: dict[str, Any], fatal: bool, says: str
) -> None:
    other = replace(NODE, host="node2", unique="b")
    assert compare([NODE, other]).advice is None
    found = compare([NODE, replace(other, **change)])
    assert found.fatal == fatal
    assert says in f"{found.found} {found.advice}"


def test_gpu_nodes_without_infiniband_are_told() -> None:
    nodes = [replace(NODE, host=host, infiniband=[]) for host in ("node1", "node2")]
    assert "TCP" in str(machine.compare_links(nodes).advice)
    assert machine.compare_links(nodes[:1]).advice is None
