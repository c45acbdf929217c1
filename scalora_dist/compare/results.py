"""Computes the results of a study from the records of its runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scalora_dist.compare.record import point_steps
from scalora_dist.compare.runs import Cell, Run
from scalora_dist.compare.schedule import CellPlan
from scalora_dist.compare.statistics import (
    Array,
    Difference,
    first_at_most,
    good_rates,
    mean_and_sd,
    paired_difference,
    running_mean,
)
from scalora_dist.compare.study import Study


@dataclass(frozen=True)
class Curve:
    """Running means of the training losses of the final runs that did not diverge.

    Attributes:
        steps: (points,) the last step of each point, counted from 1.
        mean: (points,) mean over seeds.
        low: (points,) lowest seed.
        high: (points,) highest seed.
    """

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class CellResult:
    """What is known of a cell. Fields of final runs are None until all of them are finished.

    Attributes:
        cell: the method, its rank and the set-up.
        tuning: learning rate, seed and validation loss (None: diverged) of the tuning runs.
        decided: whether the search for the learning rate is over.
        best_rate: the learning rate of the final runs. None: not decided, or all rates diverged.
        limited: whether the best rate is at the edge of a grid that may not be widened more.
        good_rates: as `statistics.good_rates`, by the first tuning seed. None: no best rate.
        complete: whether all final runs are finished.
        diverged: number of final runs that diverged.
        train_loss: mean and sd over seeds of the training loss at the end (running mean).
        loss: mean and sd over seeds of the loss on test.
        exact_match: mean and sd over seeds of the exact match on test, a share.
        trained_parameters: number of trained parameters.
        update_rank: mean rank of the accumulated updates, over measured layers and seeds.
        rules: {rule: share of all layers' rescales that took it}.
        seconds_per_step: mean over seeds.
        peak_memory_bytes: of the run that needed most.
        curve: training losses over steps.
    """

    cell: Cell
    tuning: list[dict[str, Any]]
    decided: bool
    best_rate: float | None
    limited: bool
    good_rates: tuple[float, float] | None
    complete: bool
    diverged: int
    train_loss: dict[str, Any] | None = None
    loss: dict[str, Any] | None = None
    exact_match: dict[str, Any] | None = None
    trained_parameters: int | None = None
    update_rank: float | None = None
    rules: dict[str, float] | None = None
    seconds_per_step: float | None = None
    peak_memory_bytes: int | None = None
    curve: Curve | None = None


@dataclass(frozen=True)
class Comparison:
    """A cell against another of the same set-up, by their final runs.

    Attributes:
        ours: the cell.
        theirs: the other cell.
        loss: difference of the loss on test.
        exact_match: difference of the exact match on test.
        steps: steps until our training loss is at most their last one; None: not reached.
        seconds: the time of these steps.
    """

    ours: Cell
    theirs: Cell
    loss: Difference
    exact_match: Difference
    steps: int | None
    seconds: float | None


@dataclass(frozen=True)
class Table:
    """One table of the report: all methods of a set-up at one rank."""

    rank: int | None
    rows: list[CellResult]
    baseline: Cell | None


@dataclass(frozen=True)
class SetupResult:
    """The results of one set-up.

    Attributes:
        name: its name.
        planned: number of comparisons, also of those that are not finished.
        tables: one for each rank.
        comparisons: the finished ones.
        against: pairs that the study's ``against`` asks for.
    """

    name: str
    planned: int
    tables: list[Table]
    comparisons: list[Comparison]
    against: list[tuple[Cell, Cell]]


def picture(kind: str, setup: str, rank: int | None = None) -> str:
    """The file name of a picture: loss by "rate", "step" or "rank"."""
    end = "" if rank is None else f"-r{rank}"
    return f"loss_by_{kind}-{setup}{end}.png"


def compute(
    study: Study, plans: list[CellPlan], finished: Mapping[Run, Mapping[str, Any]]
) -> list[SetupResult]:
    """The results of each set-up, as far as its runs are finished."""
    cells = {plan.cell: _cell_result(study, plan, finished) for plan in plans}
    return [_setup_result(study, name, cells, finished) for name in study.setups]


def _setup_result(
    study: Study,
    setup: str,
    cells: Mapping[Cell, CellResult],
    finished: Mapping[Run, Mapping[str, Any]],
) -> SetupResult:
    tables, pairs = [], []
    for rank in study.ranks(setup):
        here = [Cell(setup, label, x) for label in study.methods for x in {rank, None}]
        rows = [cells[cell] for cell in here if cell in cells]
        baseline = next((x.cell for x in rows if x.cell.label == study.baseline), None)
        tables.append(Table(rank, rows, baseline))
        if baseline:
            pairs += [(row.cell, baseline) for row in rows if row.cell != baseline]
    against = []
    for label, other in study.against.items():
        for cell in cells:
            if (cell.setup, cell.label) == (setup, label) and cell.rank:
                theirs = Cell(setup, other.method, cell.rank * other.times_rank)
                if theirs in cells:
                    against.append((cell, theirs))
    pairs = list(dict.fromkeys([*pairs, *against]))
    comparisons = [
        _compare(cells[ours], cells[theirs], len(pairs), study, finished)
        for ours, theirs in pairs
        if cells[ours].complete and cells[theirs].complete
    ]
    return SetupResult(setup, len(pairs), tables, comparisons, against)


def _finals(
    study: Study,
    cell: Cell,
    best_rate: float | None,
    finished: Mapping[Run, Mapping[str, Any]],
) -> list[Mapping[str, Any]]:
    """The records of the finished final runs, in the order of their seeds."""
    if best_rate is None:
        return []
    runs = [Run(cell, best_rate, seed, "final") for seed in study.final_seeds]
    return [finished[run] for run in runs if run in finished]


def _cell_result(
    study: Study, plan: CellPlan, finished: Mapping[Run, Mapping[str, Any]]
) -> CellResult:
    tuning: list[dict[str, Any]] = [
        {
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "loss": None if record["diverged"] else record["eval_loss"],
        }
        for run, record in finished.items()
        if (run.cell, run.part) == (plan.cell, "tune")
    ]
    tuning.sort(key=lambda each: (each["learning_rate"], each["seed"]))
    first = {
        each["learning_rate"]: math.inf if each["loss"] is None else each["loss"]
        for each in tuning
        if each["seed"] == study.tuning_seeds[0]
    }
    records = _finals(study, plan.cell, plan.best_rate, finished)
    sound = [record for record in records if not record["diverged"]]
    complete = len(records) == len(study.final_seeds)
    known: dict[str, Any] = {}
    if complete and sound:
        known = _final_numbers(sound)
    return CellResult(
        cell=plan.cell,
        tuning=tuning,
        decided=plan.decided,
        best_rate=plan.best_rate,
        limited=plan.limited,
        good_rates=None if plan.best_rate is None else good_rates(first, plan.best_rate),
        complete=complete,
        diverged=len(records) - len(sound),
        **known,
    )


def _final_numbers(records: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of `CellResult` that come from final runs. None of them diverged."""
    means = _running_means(records)
    ranks = [rank for record in records for rank in record["update_rank"]]
    rules: Counter[str] = Counter()
    for record in records:
        rules.update(record["layers_by_rule"])
    return {
        "train_loss": mean_and_sd(means[:, -1].tolist()),
        "loss": mean_and_sd([record["eval_loss"] for record in records]),
        "exact_match": mean_and_sd([record["eval_exact_match"] for record in records]),
        "trained_parameters": records[0]["trained_parameters"],
        "update_rank": float(np.mean(ranks)) if ranks else None,
        "rules": {rule: n / rules.total() for rule, n in rules.items() if n},
        "seconds_per_step": float(np.mean([record["seconds_per_step"] for record in records])),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
        "curve": Curve(
            steps=point_steps(records[0]["steps"], means.shape[1]),
            mean=means.mean(axis=0).tolist(),
            low=means.min(axis=0).tolist(),
            high=means.max(axis=0).tolist(),
        ),
    }


def _running_means(records: list[Mapping[str, Any]]) -> Array:
    """(seeds, points) running means of training losses. Those of skipped steps are interpolated."""
    rows = []
    for record in records:
        losses = np.array(record["losses"], dtype=np.float64)  # None becomes NaN
        (known,) = np.nonzero(np.isfinite(losses))
        rows.append(np.interp(np.arange(len(losses)), known, losses[known]))
    return running_mean(np.stack(rows))


def _compare(
    ours: CellResult,
    theirs: CellResult,
    comparisons: int,
    study: Study,
    finished: Mapping[Run, Mapping[str, Any]],
) -> Comparison:
    def numbers(result: CellResult, name: str) -> list[float]:
        records = _finals(study, result.cell, result.best_rate, finished)
        return [math.inf if record["diverged"] else record[name] for record in records]

    def difference(name: str) -> Difference:
        return paired_difference(numbers(ours, name), numbers(theirs, name), comparisons)

    steps = seconds = None
    if ours.curve and theirs.curve:
        point = first_at_most(np.array(ours.curve.mean), theirs.curve.mean[-1])
        if point is not None and ours.seconds_per_step is not None:
            steps = ours.curve.steps[point]
            seconds = steps * ours.seconds_per_step
    return Comparison(
        ours.cell,
        theirs.cell,
        difference("eval_loss"),
        difference("eval_exact_match"),
        steps,
        seconds,
    )
