"""Which runs a study needs, by made-up losses of its runs."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from scalora_dist.compare.runs import Cell, Grid, Run
from scalora_dist.compare.schedule import MOST_WIDENINGS, CellPlan, plan
from scalora_dist.compare.study import Setup, Study, StudyMethod
from scalora_dist.config.data import DataArguments

Loss = Callable[[Run], float]
CELL = Cell("task", "A", 2)


def study(
    tuning_seeds: int = 2,
    rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1),
    choose_by: str = "eval_loss",
) -> Study:
    method = StudyMethod("A", {}, Grid(rates), (2, 8), ("task",))
    return Study(
        setups={"task": Setup("task", {}, DataArguments(), None, "test")},
        methods={"A": method},
        baseline="A",
        against={},
        validation_size=1,
        test_size=1,
        tuning_seeds=tuple(range(tuning_seeds)),
        final_seeds=tuple(range(100, 105)),
        choose_by=choose_by,
        gpus_per_run=1,
        smoke=False,
    )


def best_at(rate: float) -> Loss:
    """A loss with its minimum at a rate; the seed changes it a little."""
    return lambda run: 1 + math.log10(run.learning_rate / rate) ** 2 + 0.001 * run.seed


def drive(
    of: Study,
    loss: Loss,
    order: random.Random | None = None,
    match: Callable[[float], float] = lambda rate: 0.0,
) -> tuple[list[Run], list[CellPlan]]:
    """Finish needed runs, one at a time, until none is needed. Returns them, and the last plan."""
    finished: dict[Run, dict[str, Any]] = {}
    while needed := [run for each in plan(of, finished) for run in each.needed]:
        assert not set(needed) & set(finished)
        run = order.choice(needed) if order else needed[0]
        value = loss(run)
        finished[run] = {
            "diverged": math.isinf(value),
            "eval_loss": value,
            "eval_exact_match": match(run.learning_rate),
        }
        assert len(finished) < 200
    return list(finished), plan(of, finished)


def seeds_by_rate(runs: list[Run]) -> Counter[float]:
    """{learning rate: number of tuning runs} of one cell."""
    return Counter(run.learning_rate for run in runs if (run.cell, run.part) == (CELL, "tune"))


@pytest.mark.parametrize("best", [1e-5, 1e-4, 1e-2, 1e1])
def test_a_grid_is_widened_until_the_best_rate_has_neighbours(best: float) -> None:
    runs, plans = drive(study(), best_at(best))
    tried = seeds_by_rate(runs)
    for each in plans:
        assert each.best_rate == pytest.approx(best)
        assert not each.limited
    assert any(rate == pytest.approx(best / 10) for rate in tried)
    assert any(rate == pytest.approx(best * 10) for rate in tried)
    assert len(tried) == 3 + max(0, round(abs(math.log10(best / 1e-2))))


def test_a_grid_is_widened_at_most_so_often() -> None:
    runs, plans = drive(study(), lambda run: 1 / run.learning_rate)
    assert all(each.limited for each in plans)
    assert len(seeds_by_rate(runs)) == 3 + MOST_WIDENINGS


def test_the_better_half_of_the_rates_gets_the_next_seed() -> None:
    rates = (1e-4, 1e-3, 1e-2, 1e-1, 1e0)
    runs, plans = drive(study(3, rates), best_at(1e-2))
    assert sorted(seeds_by_rate(runs).values()) == [1, 1, 2, 3, 3]
    assert seeds_by_rate(runs)[1e-2] == 3
    assert plans[0].best_rate == 1e-2


def test_the_mean_over_seeds_decides_and_may_widen_the_grid() -> None:
    """With the second seed the rate at the edge wins: the grid is widened by a run of each seed."""

    def loss(run: Run) -> float:
        return {1e-3: 5.0, 1e-2: 1.0, 1e-1: 1.5 - 2.0 * run.seed}.get(run.learning_rate, 9.0)

    runs, plans = drive(study(2), loss)
    assert seeds_by_rate(runs) == {1e-3: 1, 1e-2: 2, 1e-1: 2, 1e0: 2}
    assert plans[0].best_rate == 1e-1


def test_final_runs_have_the_best_rate_and_fresh_seeds() -> None:
    runs, _ = drive(study(), best_at(1e-2))
    finals = [run for run in runs if run.part == "final"]
    assert {run.learning_rate for run in finals} == {1e-2}
    assert not {run.seed for run in finals} & {run.seed for run in runs if run.part == "tune"}
    assert Counter(run.cell.rank for run in finals) == {2: 5, 8: 5}


def test_rates_that_diverge_are_not_chosen() -> None:
    sound = best_at(1e-1)
    runs, plans = drive(study(), lambda run: sound(run) if run.learning_rate < 0.05 else math.inf)
    assert plans[0].best_rate == 1e-2
    runs, plans = drive(study(), lambda run: math.inf)
    assert plans[0].decided and plans[0].best_rate is None and plans[0].limited
    assert not [run for run in runs if run.part == "final"]


def test_of_equal_exact_matches_the_lower_loss_decides() -> None:
    by_match = study(choose_by="eval_exact_match")
    _, plans = drive(by_match, best_at(1e-2))
    assert plans[0].best_rate == 1e-2
    _, plans = drive(by_match, best_at(1e-2), match=lambda rate: float(0.05 < rate < 0.5))
    assert plans[0].best_rate == 1e-1


def test_decisions_depend_on_the_finished_runs_alone() -> None:
    """Whatever run ends first, and from any prefix of the results, the study is the same."""
    loss = best_at(1e-4)
    runs, plans = drive(study(), loss)
    for seed in range(5):
        others, last = drive(study(), loss, random.Random(seed))
        assert set(others) == set(runs)
        assert last == plans
        for count in range(len(others)):
            finished = {run: {"diverged": False, "eval_loss": loss(run)} for run in others[:count]}
            needed = {run for each in plan(study(), finished) for run in each.needed}
            assert needed <= set(runs) - set(finished)
            assert needed or count == len(others)
