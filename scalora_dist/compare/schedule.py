"""Decides which runs a study needs next, from the study and the finished runs alone.

A stopped study needs no other state: the decisions are made again from its first run on.

The learning rate of a cell is found by successive halving over *seeds*. All rates of the grid get
the first seed; the better half gets the second, and so on. Halving over *steps* would be cheaper,
but a run of fewer steps prefers other rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeAlias

from scalora_dist.compare.runs import Cell, Grid, Part, Run
from scalora_dist.compare.study import Study
from scalora_dist.core.arithmetic import ceil_div

# The lower, the better; where the first numbers are equal, the second decides, which is the loss.
# Infinity: the run diverged.
Score: TypeAlias = tuple[float, float]
# How often a grid may be widened on each side.
MOST_WIDENINGS = 6


@dataclass(frozen=True)
class Tuning:
    """How far the search for one learning rate is.

    Attributes:
        needed: (position in the grid, seed) of the runs that are needed now. Empty: decided.
        best: position of the best rate. None: not decided, or the runs of all rates diverged.
        limited: whether the best rate has no neighbour on one side, since the limit is reached.
    """

    needed: tuple[tuple[int, int], ...] = ()
    best: int | None = None
    limited: bool = False


@dataclass(frozen=True)
class CellPlan:
    """How far a cell is.

    Attributes:
        cell: the method, its rank and the set-up.
        needed: runs that are needed now and not finished.
        decided: whether the search for the learning rate is over.
        best_rate: the learning rate of the final runs. None: not decided, or all rates diverged.
        limited: as in `Tuning`.
    """

    cell: Cell
    needed: tuple[Run, ...]
    decided: bool
    best_rate: float | None
    limited: bool

    @property
    def complete(self) -> bool:
        """Whether the cell needs no more runs."""
        return self.decided and not self.needed


def tune(size: int, seeds: Sequence[int], score: Callable[[int, int], Score | None]) -> Tuning:
    """Decide how the search for a learning rate goes on.

    Args:
        size: number of rates of the grid before it is widened.
        seeds: tuning seeds.
        score: the score of (position in the grid, seed), as `score_of`; None if the run is not
            finished.
    """
    low, high = 0, size - 1
    alive = list(range(size))
    best = 0

    def mean(position: int, used: Sequence[int]) -> tuple[float, float, int]:
        # Called for finished runs only. Of equal scores the lower rate wins.
        scores = (score(position, seed) for seed in used)
        chosen_by, loss = zip(*(each for each in scores if each is not None), strict=True)
        return fmean(chosen_by), fmean(loss), position

    for count in range(1, len(seeds) + 1):
        used, before = seeds[:count], seeds[: count - 1]
        if before:
            ordered = sorted(alive, key=lambda position: mean(position, before))
            alive = ordered[: ceil_div(len(alive), 2)]
        while True:
            needed = [(k, s) for s in used for k in sorted(alive) if score(k, s) is None]
            if needed:
                return Tuning(needed=tuple(needed))
            best = min(alive, key=lambda position: mean(position, used))
            if best == low and low > -MOST_WIDENINGS:
                low -= 1
                alive.append(low)
            elif best == high and high < size - 1 + MOST_WIDENINGS:
                high += 1
                alive.append(high)
            else:
                break
    limited = best in (low, high)
    if math.isinf(mean(best, seeds)[0]):
        return Tuning(limited=limited)
    return Tuning(best=best, limited=limited)


def plan(study: Study, finished: Mapping[Run, Mapping[str, Any]]) -> list[CellPlan]:
    """What each cell of a study needs now.

    Args:
        finished: the records of finished runs (`record.make_record`).
    """
    return [_plan_cell(study, cell, finished) for cell in study.cells]


def _plan_cell(study: Study, cell: Cell, finished: Mapping[Run, Mapping[str, Any]]) -> CellPlan:
    grid: Grid = study.methods[cell.label].grid

    def run(position: int, seed: int, part: Part) -> Run:
        return Run(cell, grid.rate(position), seed, part)

    def score(position: int, seed: int) -> Score | None:
        record = finished.get(run(position, seed, "tune"))
        return None if record is None else score_of(record, study.choose_by)

    tuning = tune(len(grid.rates), study.tuning_seeds, score)
    if tuning.needed:
        needed = tuple(run(position, seed, "tune") for position, seed in tuning.needed)
        return CellPlan(cell, needed, decided=False, best_rate=None, limited=False)
    if tuning.best is None:
        return CellPlan(cell, (), decided=True, best_rate=None, limited=tuning.limited)
    finals = (run(tuning.best, seed, "final") for seed in study.final_seeds)
    return CellPlan(
        cell,
        tuple(each for each in finals if each not in finished),
        decided=True,
        best_rate=grid.rate(tuning.best),
        limited=tuning.limited,
    )


def score_of(record: Mapping[str, Any], choose_by: str) -> Score:
    """What a learning rate is chosen by. Rates often have the same exact match, of 0 say."""
    if record["diverged"]:
        return math.inf, math.inf
    loss = record["eval_loss"]
    return (loss if choose_by == "eval_loss" else -record["eval_exact_match"]), loss
