"""Two nodes with a network between them, started by launch/node.sh: training, a node's death."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scalora_dist.checkpoint.manifest import checkpoints
from scalora_dist.distributed.stop_signals import PREEMPTED
from tests.support import launched, nodes, runs, tiny_runs
from tests.support.nodes import Node
from tools.rehearse.nodes import until

HANG_SECONDS = 8
LAUNCHERS = {"fsdp": "torchrun", "zero3": "deepspeed"}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[Node]]:
    with nodes.two_nodes(tmp_path) as made:
        yield made


@pytest.mark.parametrize(
    ("engine", "dead", "how", "hang_seconds"),
    [
        ("fsdp", 1, "pull_the_cable", HANG_SECONDS),
        ("zero3", 1, "die", HANG_SECONDS),
        ("zero3", 0, "pull_the_cable", 600),  # with the store: it is cut off, and not slow
    ],
)
@pytest.mark.heavy
def test_two_nodes_train_as_one_until_one_dies(
    ranks: Any,
    odd: Path,
    tmp_path: Path,
    pair: list[Node],
    engine: str,
    dead: int,
    how: str,
    hang_seconds: int,
) -> None:
    """The losses of one node, and whose death it was; a pulled cable closes no connections."""
    steps = {"max_steps": 3, "save_steps": 0, "lr_scheduler_type": "constant"}
    alone = tiny_runs.options(odd, tmp_path / "alone", engine, **steps)
    endless = {"output_dir": tmp_path / "run", "max_steps": 100_000, "hang_timeout": hang_seconds}
    for node in pair:
        node.start({**alone, **endless}, LAUNCHER=LAUNCHERS[engine])
    ranks(2).run(tiny_runs.train, alone)
    until(lambda: launched.last_step(tmp_path / "run") >= 3, pair)
    getattr(pair[dead], how)()
    died = time.monotonic()
    other = pair[1 - dead]
    assert other.wait() != 0, other.text()
    assert time.monotonic() - died < min(hang_seconds, 30) + 30, other.text()
    named = [line for line in other.errors() if f"rank {dead} stopped answering in step " in line]
    assert len(named) == len(other.errors()) == 1, other.text()
    assert runs.losses(tmp_path / "run")[:3] == runs.losses(tmp_path / "alone")
    for node in pair:
        assert node.tokenized() == 1, "each node fills its own cache, once"


@pytest.mark.heavy
@pytest.mark.parametrize(("engine", "ranks_of_each"), [("zero3", 1), ("fsdp", 2)])
def test_a_whole_run_on_two_nodes(
    ranks: Any, odd: Path, tmp_path: Path, pair: list[Node], engine: str, ranks_of_each: int
) -> None:
    """With evaluations, a checkpoint and a model, to the last digit, and over the cable."""
    case = tiny_runs.options(odd, tmp_path / "nodes", engine, max_steps=3, save_steps=2)
    case["save_model"] = True
    for node in pair:
        node.start(case, LAUNCHER=LAUNCHERS[engine], NPROC_PER_NODE=ranks_of_each)
    for node in pair:
        assert node.wait() == 0, node.text()
    ranks(2 * ranks_of_each).run(tiny_runs.train, {**case, "output_dir": tmp_path / "alone"})
    assert tiny_runs.lines(tmp_path / "nodes") == tiny_runs.lines(tmp_path / "alone")
    assert tiny_runs.digests(tmp_path / "nodes") == tiny_runs.digests(tmp_path / "alone")
    kept = [folder.name for folder in checkpoints(tmp_path / "nodes")]
    assert kept == ["checkpoint-3", "checkpoint-2"], "the last step is saved too"
    for node in pair:
        assert node.tokenized() == 1
        assert node.received() > 100_000


@pytest.mark.parametrize(
    ("engine", "number"),
    [
        pytest.param("fsdp", signal.SIGTERM, marks=pytest.mark.heavy),
        pytest.param("zero3", signal.SIGUSR1, marks=pytest.mark.heavy),
    ],
)
def test_a_signal_to_one_node_saves_and_ends_both(
    odd: Path, tmp_path: Path, pair: list[Node], engine: str, number: signal.Signals
) -> None:
    case = tiny_runs.options(odd, tmp_path / "run", engine, max_steps=100_000, save_steps=0)
    for node in pair:
        node.start(case, LAUNCHER=LAUNCHERS[engine])
    until(lambda: launched.last_step(tmp_path / "run") >= 3, pair)
    assert pair[1].process
    pair[1].process.send_signal(number)
    expected = [{"fsdp": 1, "zero3": 75}[engine], 75]  # torchrun does not pass the ranks' 75 on
    for node in pair:
        assert node.wait(60) == expected[node.number], node.text()
    step = int((tmp_path / "run" / PREEMPTED).read_text())
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == [f"checkpoint-{step}"]
