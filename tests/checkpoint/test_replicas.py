"""Ranks that hold copies of one tensor, or of one shard of it, are compared before every save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scalora_dist.checkpoint.manifest import checkpoints, is_sound, step_of
from scalora_dist.checkpoint.replicas import Differing, describe_differing, differing
from scalora_dist.distributed.stop_signals import PREEMPTED
from tests.support import launched, tiny_models, tiny_runs
from tests.support.forked import Forked
from tests.support.ranks import Ranks
from tests.support.toy import ranks_of
from tests.support.workers import replicas as work
from tests.support.workers.replicas import FLIPPED

GetRanks = Callable[[int], Ranks]
HEAVY = pytest.mark.heavy


# Which ranks are named.


@pytest.mark.parametrize(
    ("columns", "sizes", "expected"),
    [
        ([[7, 7]], [1], None),
        ([[7, 7, 7]], [1], None),
        ([[7, 8]], [1], ([0, 1], False)),
        ([[7, 8, 7]], [1], ([1], True)),
        ([[7, 8, 8, 9, 8]], [1], ([0, 3], True)),
        ([[7, 8, 9]], [1], ([0, 1, 2], False)),
        ([[7, 7, 8, 8]], [1], ([0, 1, 2, 3], False)),
        ([[1, 2, 1, 2]], [2], None),  # two replicas of two shards
        ([[1, 2, 1, 3]], [2], ([1, 3], False)),
        ([[1, 2, 1, 2, 4, 2]], [2], ([4], True)),
        ([[1, 2, 1, 3, 4, 2]], [2], ([3, 4], True)),
        ([[1, 2, 3, 4]], [4], None),
        ([[1, 2, 1, 2], [5, 5, 5, 6]], [2, 1], ([3], True)),
        ([[1, 2, 1, 3], [5, 6, 5, 5]], [2, 1], ([1, 3], False)),
    ],
)
def test_who_is_outvoted(
    columns: list[list[int]], sizes: list[int], expected: tuple[list[int], bool] | None
) -> None:
    assert differing(torch.tensor(columns).T, sizes) == expected


@pytest.mark.parametrize(
    ("found", "names", "expected"),
    [
        (([3], True), ["a"], "rank 3 holds other values of a than most ranks"),
        (([0, 3], True), ["a", "b"], "ranks 0 and 3 hold other values of a and 1 more than most"),
        (([0, 1, 5], False), ["a"], "ranks 0, 1 and 5 hold different values of a"),
        ((list(range(10)), False), ["a"], "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more hold different"),
    ],
)
def test_the_ranks_are_named(
    found: tuple[list[int], bool], names: list[str], expected: str
) -> None:
    assert describe_differing(Differing(*found), names).startswith(expected)


# On each engine's real shards.

# What each engine keeps a copy of on every rank, or on every replica.
COPIES = [
    ("zero0", "bf16", ["first.W", "first.A", "second.m_B", "first.0.A of the forward"]),
    ("zero1", "bf16", ["second.low", "second.B of the forward"]),
    ("zero2", "bf16", ["first.W", "second.low", "second.B of the forward"]),
    ("zero2", "fp32", ["first.W", "second.B of the forward"]),
    ("hybrid", "bf16", ["first.W", "second.low", "first.A", "second.v_B"]),
]
EVERY_DAY = {"first.W", "second.low", "second.B of the forward"}


def cases() -> list[Any]:
    found = []
    for engine, dtype, names in COPIES:
        for name in names:
            often = engine in ("zero2", "hybrid") and dtype == "bf16" and name in EVERY_DAY
            found.append(pytest.param(engine, dtype, name, marks=() if often else HEAVY))
    return found


@pytest.mark.parametrize(("engine", "dtype", "name"), cases())
def test_a_flipped_bit_is_refused(
    ranks: GetRanks, tmp_path: Path, engine: str, dtype: str, name: str
) -> None:
    """On rank 1: with two copies nobody can say which is right, so both ranks are named."""
    size = ranks_of(engine)
    patterns = [None, FLIPPED, None, None][:size]
    who = "ranks 1 and 3" if engine == "hybrid" else "ranks 0 and 1"
    case: dict[str, Any] = {"engine": engine, "dtype": dtype}
    for before, after in ranks(size).run(work.change, tmp_path, name, patterns, **case):
        assert before is None
        told, status = after
        assert status == 1 and "\n" not in told
        assert told.startswith(f"{who} hold different values of {name}: checkpoint-2 is not")
        assert "start again on other nodes" in told


def test_a_majority_tells_who_is_wrong(ranks: GetRanks, tmp_path: Path) -> None:
    patterns = [None, None, FLIPPED, None]
    for _, after in ranks(4).run(work.change, tmp_path, "first.W", patterns, engine="zero0"):
        assert after[0].startswith("rank 2 holds other values of first.W than most ranks: ")


NAN, OTHER_NAN, MINUS_ZERO = 0x7FC0, 0x7FC1, -0x8000  # of bfloat16


@pytest.mark.parametrize(
    ("patterns", "refused"),
    [((NAN, NAN), False), ((NAN, OTHER_NAN), True), ((0, MINUS_ZERO), True), ((0, 0), False)],
)
def test_bits_are_compared_and_not_numbers(
    ranks: GetRanks, tmp_path: Path, patterns: tuple[int, int], refused: bool
) -> None:
    case: dict[str, Any] = {"engine": "zero2", "dtype": "bf16"}
    for _, after in ranks(2).run(work.change, tmp_path, "first.W", patterns, **case):
        assert (after is not None) == refused


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp", "hybrid", "local"])
def test_what_the_check_sends(ranks: GetRanks, tmp_path: Path, engine: str) -> None:
    """One number per rank where there are copies, else nothing at all."""
    size = ranks_of(engine)
    copied = engine in ("zero2", "hybrid")
    expected = {"all_gather_into_tensor": 1, "gathered elements": size} if copied else {}
    assert ranks(size).run(work.collectives, tmp_path, engine=engine) == [expected] * size


# In whole runs.


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


def options(task: Path, folder: Path, engine: str, **others: Any) -> dict[str, Any]:
    return tiny_runs.options(task, folder, engine, max_steps=6, save_steps=2, **others)


def check_left(folder: Path, told: str, who: str, step: int = 4) -> None:
    """The save at ``step`` is refused. The checkpoint of step 2 is there, whole, and is named."""
    assert told.startswith(f"{who} hold different values of model.layers.0.self_attn.q_proj.")
    assert f"checkpoint-{step} is not written" in told and "\n" not in told
    assert "go on from checkpoint-2 with --resume_from_checkpoint latest, on other" in told
    assert [step_of(found) for found in checkpoints(folder)] == [2]
    assert is_sound(folder / "checkpoint-2")
    assert not list(folder.glob("*.partial"))
    assert launched.last_step(folder) == step
    assert not (folder / "summary.json").exists() and not (folder / PREEMPTED).exists()


@pytest.mark.parametrize(
    ("engine", "strike"),
    [
        ("zero2", {"part": "low"}),
        pytest.param("zero0", {}, marks=HEAVY),
        pytest.param("zero1", {}, marks=HEAVY),
        pytest.param("hybrid", {}, marks=HEAVY),
        pytest.param("hybrid", {"part": "low"}, marks=HEAVY),
        pytest.param("zero2", {"asked": True}, marks=HEAVY),
    ],
)
def test_a_run_ends_before_it_saves_copies_that_differ(
    ranks: GetRanks, task: Path, tmp_path: Path, engine: str, strike: dict[str, Any]
) -> None:
    """A bit flips after step 3. The next save is due at step 4, or a signal asks for it at once.

    From the checkpoint before it, the run goes on as if it had never been struck.
    """
    size = ranks_of(engine)
    case = options(task, tmp_path / "run", engine, bf16=True)
    who = "ranks 1 and 3" if engine == "hybrid" else "ranks 0 and 1"
    for told, status in ranks(size).run(work.refused, case, **strike):
        assert status == 1
        check_left(tmp_path / "run", told, who, step=3 if "asked" in strike else 4)
    answers = ranks(size).run(tiny_runs.train, {**case, "resume_from_checkpoint": "latest"})
    assert [first for first, *_ in answers] == [2] * size
    whole = {**case, "output_dir": tmp_path / "uninterrupted"}
    ranks(size).run(tiny_runs.train, whole)
    assert tiny_runs.lines(tmp_path / "run") == tiny_runs.lines(tmp_path / "uninterrupted")


@pytest.mark.heavy
@pytest.mark.parametrize("engine", ["zero2", "hybrid"])
def test_the_status_of_the_command(task: Path, tmp_path: Path, engine: str) -> None:
    """On two ranks; a hybrid mesh of two replicas of one rank each."""
    case = options(task, tmp_path / "run", engine, bf16=True)
    if engine == "hybrid":
        (tmp_path / "hybrid.json").write_text('{"mesh_shape": [2, 1]}')
    with Forked(2, case, tmp_path / "log", trainer=work.Struck) as run:
        assert run.wait()[0] == 1, run.text()  # launchers pass on the first failure
    errors = [line for line in run.text().splitlines() if "error: ranks" in line]
    assert len(errors) == 1, run.text()
    check_left(tmp_path / "run", errors[0].partition("error: ")[2], "ranks 0 and 1")
