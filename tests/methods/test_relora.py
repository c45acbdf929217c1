"""ReLoRA's restarts on real ranks, against what is written out densely."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalora_dist.methods.relora import warmed_up_again
from tests.support import runs, tiny_models, tiny_runs, toy
from tests.support.reference import relative_error
from tests.support.workers.relora import RESTARTS, Restart, restarts

EVERYWHERE = [(1, "local"), *itertools.product([2, 3], ["zero2", "zero3", "fsdp"])]


@pytest.fixture(scope="module")
def alone(ranks: Any) -> list[Restart]:
    """In one process, in fp32."""
    return ranks(1).run(restarts, prune=0.9, engine="local")[0]


@pytest.mark.gpu
@pytest.mark.parametrize(("world", "engine"), EVERYWHERE)
def test_a_restart_preserves_the_function(
    ranks: Any, alone: list[Restart], world: int, engine: str
) -> None:
    answers = ranks(world).run(restarts, prune=0.9, engine=engine)
    assert all(len(seen) == RESTARTS for seen in answers)
    for number, restart in enumerate(answers[0]):
        check_merged(restart, increment_error=1e-3)
        check_pruned(restart, 0.9)
        outputs_before, outputs_after = restart.before[1], restart.after[1]
        for name in toy.SHAPES:
            assert relative_error(outputs_after[name], outputs_before[name]) < 1e-6
            # One B for all, whatever the number of ranks and the engine.
            expected = alone[number].after[0][name].B
            for answer in answers:
                assert np.array_equal(answer[number].after[0][name].B, expected)
    for name, (_, features) in toy.SHAPES.items():
        drawn = [alone[0].before[0][name].B, *(restart.after[0][name].B for restart in alone)]
        for one, other in itertools.combinations(drawn, 2):
            assert relative_error(one, other) > 0.5
        assert all(0 < np.abs(b).max() <= features**-0.5 for b in drawn[1:])


def check_merged(restart: Restart, increment_error: float) -> None:
    """W took s·A Bᵀ, A is 0."""
    for name, before in restart.before[0].items():
        after = restart.after[0][name]
        increment = toy.SCALING * before.A @ before.B.T
        assert relative_error(after.W, before.W + increment) < 1e-6
        # W's own digits are most of the error.
        assert relative_error(after.W - before.W, increment) < increment_error
        assert before.A.any() and not after.A.any()


def check_pruned(restart: Restart, share: float) -> None:
    """That share of m, the smallest of it, is 0, and v in the same places; the rest as it was."""
    for name, factor in itertools.product(toy.SHAPES, "AB"):
        first = getattr(restart.before[0][name], f"m_{factor}").ravel()
        order = np.argsort(np.abs(first), kind="stable")
        gone = int(share * first.size)
        for moment in "mv":
            before = getattr(restart.before[0][name], f"{moment}_{factor}").ravel()
            after = getattr(restart.after[0][name], f"{moment}_{factor}").ravel()
            assert before.all(), "nothing was zero, so every zero is a pruned one"
            assert not after[order[:gone]].any()
            assert np.array_equal(after[order[gone:]], before[order[gone:]])


@pytest.mark.parametrize(("world", "engine"), [(1, "local"), (2, "zero2"), (3, "fsdp")])
@pytest.mark.parametrize("prune", [0.0, 0.5, 1.0])
def test_the_share_of_the_moments_that_is_reset(
    ranks: Any, world: int, engine: str, prune: float
) -> None:
    """0 resets none, 1 all."""
    for restart in ranks(world).run(restarts, prune=prune, engine=engine)[0]:
        check_pruned(restart, prune)


@pytest.mark.parametrize(("world", "engine"), [(1, "local"), (2, "zero3"), (2, "fsdp")])
def test_low_halves_carry_what_is_merged_into_16_bit_weights(
    ranks: Any, world: int, engine: str
) -> None:
    for restart in ranks(world).run(restarts, prune=0.9, engine=engine, dtype="bf16")[0]:
        check_merged(restart, increment_error=1e-3)
        for name, high in restart.high.items():
            before, after = restart.before[0][name], restart.after[0][name]
            # Without them much of the increment would be lost.
            assert relative_error(high - before.W, after.W - before.W) > 0.05
            assert relative_error(high, after.W) < 2.0**-8
            outputs = (side[1][name] for side in (restart.after, restart.before))
            assert relative_error(*outputs) < 2.0**-6


# --- the learning rate ---------------------------------------------------------------------------


def test_the_learning_rate_rises_again_after_each_restart() -> None:
    """From a part of the plain schedule's; equal to it before the first and after the warm-up."""
    warmed = warmed_up_again(lambda steps: 1 - steps / 12, interval=5, warmup_steps=2)
    parts = [1, 1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1, 1 / 3, 2 / 3]
    expected = [part * (1 - steps / 12) for steps, part in enumerate(parts)]
    assert [warmed(steps) for steps in range(12)] == pytest.approx(expected, rel=1e-12)


def test_without_a_warm_up_the_schedule_stays() -> None:
    warmed = warmed_up_again(lambda steps: 1 - steps / 9, interval=2, warmup_steps=0)
    assert [warmed(steps) for steps in range(9)] == [1 - steps / 9 for steps in range(9)]


@pytest.mark.parametrize(
    ("world", "engine", "schedule", "end"),
    [
        (1, "local", "linear", 0.0),
        (2, "zero2", "polynomial", 1e-7),
        (2, "fsdp", "polynomial", 1e-7),
    ],
)
def test_the_learning_rate_of_a_run_and_of_a_resumed_one(
    ranks: Any, tmp_path: Path, world: int, engine: str, schedule: str, end: float
) -> None:
    """The checkpoint lies in the warm-up after the first restart."""
    task = tiny_models.save_task(tmp_path)
    settings = {"relora_interval": 4, "relora_warmup_steps": 2, "max_steps": 10, "save_steps": 5}
    case = tiny_runs.options(
        task,
        tmp_path / "run",
        engine,
        method="relora",
        learning_rate=3e-3,
        lr_scheduler_type=schedule,
        per_device_train_batch_size=6,
        **settings,
    )
    ranks(world).run(tiny_runs.train, case)
    lines = tiny_runs.lines(tmp_path / "run")
    steps = [line for line in lines if "loss" in line]
    parts = [1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1 / 3, 2 / 3]
    plain = [end + (3e-3 - end) * (1 - taken / 10) for taken in range(10)]
    expected = [part * rate for part, rate in zip(parts, plain, strict=True)]
    assert [line["learning_rate"] for line in steps] == pytest.approx(expected, rel=1e-9)
    assert [line["step"] for line in steps if "restart" in line] == [4, 8]

    shutil.rmtree(tmp_path / "run" / "checkpoint-10")
    answers = ranks(world).run(tiny_runs.train, case | {"resume_from_checkpoint": "latest"})
    assert [first for first, *_ in answers] == [5] * world
    assert tiny_runs.lines(tmp_path / "run") == lines
    assert len(runs.losses(tmp_path / "run")) == 10
