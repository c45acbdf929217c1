"""The results of a study, from made-up records of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from scalora_dist.compare.report import render
from scalora_dist.compare.results import compute
from scalora_dist.compare.runs import Cell, Run
from scalora_dist.compare.schedule import plan
from scalora_dist.compare.study import Against, Study, StudyMethod
from tests.compare.test_schedule import study

STEPS = 40  # the running mean has two steps


def comparing(methods: dict[str, Sequence[int | None]], **against: Against) -> Study:
    """A study of methods with these ranks. The first one is the baseline."""
    one = study(tuning_seeds=1)
    grid = one.methods["A"].grid
    return replace(
        one,
        setups={"task": replace(one.setups["task"], options={"target_modules": "q|v"})},
        methods={
            label: StudyMethod(label, {}, grid, tuple(ranks), ("task",))
            for label, ranks in methods.items()
        },
        baseline=next(iter(methods)),
        against=against,
    )


def record(run: Run, speed: float) -> dict[str, Any]:
    """The training loss falls from 2 by ``speed`` a step. The rate 0.01 is best."""
    noise = 0.01 * (run.seed % 100)
    away = 0.0 if run.learning_rate == 1e-2 else 1.0
    return {
        "diverged": False,
        "eval_loss": 2 - speed * STEPS + noise * speed + away,
        "eval_exact_match": 0.5,
        "steps": STEPS,
        "losses": [2 - speed * step for step in range(1, STEPS + 1)],
        "trained_parameters": 10,
        "update_rank": [3, 4],
        "layers_by_rule": {},
        "seconds_per_step": 0.5,
        "peak_memory_bytes": 2**20,
        "device": "a device",
        "versions": {},
    }


def finish(of: Study, speeds: dict[str, float]) -> dict[Run, dict[str, Any]]:
    """The records of all runs of a study."""
    finished: dict[Run, dict[str, Any]] = {}
    while needed := [run for each in plan(of, finished) for run in each.needed]:
        finished |= {run: record(run, speeds[run.cell.label]) for run in needed}
    return finished


def test_methods_without_a_rank_make_one_table() -> None:
    of = comparing({"full": (None,), "slow": (None,)})
    finished = finish(of, {"full": 0.02, "slow": 0.01})
    (setup,) = compute(of, plan(of, finished), finished)
    (table,) = setup.tables
    assert [row.cell.label for row in table.rows] == ["full", "slow"]
    (comparison,) = setup.comparisons
    assert comparison.loss.mean == pytest.approx(0.4 - 0.02 * 0.01)
    assert comparison.loss.verdict == "higher"
    assert comparison.steps is None  # half as fast: not reached
    text = render(of, [setup], list(finished.values()))
    assert "| slow | 0.01 | 1.6050 | " in text
    assert "q\\|v" in text


def test_steps_to_the_baselines_loss_and_the_number_of_comparisons() -> None:
    """LoRA's last running mean is 2 − 0.01 · 39.5; twice as fast, it is reached at step 20.25."""
    of = comparing(
        {"LoRA": (2, 8), "fast": (2, 8), "full": (None,)}, fast=Against("LoRA", times_rank=4)
    )
    finished = finish(of, {"LoRA": 0.01, "fast": 0.02, "full": 0.01})
    (setup,) = compute(of, plan(of, finished), finished)
    assert [table.rank for table in setup.tables] == [2, 8]
    pairs = {(each.ours, each.theirs): each for each in setup.comparisons}
    lora, fast = (
        {rank: Cell("task", label, rank) for rank in (2, 8)} for label in ("LoRA", "fast")
    )
    full = Cell("task", "full", None)
    assert set(pairs) == {
        *((fast[2], lora[2]), (fast[8], lora[8]), (fast[2], lora[8])),
        *((full, lora[2]), (full, lora[8])),
    }
    assert setup.planned == 5
    found = pairs[fast[2], lora[8]]
    assert found.steps == 21 and found.seconds == 10.5
    differences = np.array([-0.4 + 0.01 * 0.01 * seed for seed in range(5)])
    assert found.loss.mean == pytest.approx(differences.mean())
    half = 4.6041 * differences.std(ddof=1) / 5**0.5  # t(4) at 1 − 0.05 / 5 / 2
    assert found.loss.high == pytest.approx(differences.mean() + half, rel=1e-4)
