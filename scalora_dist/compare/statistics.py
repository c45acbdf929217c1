"""The statistics of a study, on arrays. Knows nothing of files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

LEVEL = 0.95  # of all intervals of one number (loss, exact match) in a set-up together
TOLERANCE = 0.05  # rates whose loss is within this share of the best are good ones
WINDOW = 0.05  # running means of losses are taken over this share of the steps
NO_DIFFERENCE = "no difference that these seeds could show"


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs, paired by seed.

    Attributes:
        mean: mean difference; None: a run diverged.
        low: lower end of the interval; None: a run diverged.
        high: upper end of it.
        verdict: "lower" or "higher" (ours), ``NO_DIFFERENCE``, or how many seeds diverged.
    """

    mean: float | None
    low: float | None
    high: float | None
    verdict: str


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], comparisons: int
) -> Difference:
    """Compare two methods by Student's t on the differences of the same seeds.

    Args:
        ours: a number for each seed, at least two; inf: this seed's run diverged.
        theirs: the numbers of the other method, in the same order of seeds.
        comparisons: number of comparisons that share ``LEVEL`` (Bonferroni).
    """
    for who, values in (("", ours), ("the other ", theirs)):
        if lost := int(np.isinf(values).sum()):
            return Difference(None, None, None, f"{who}diverged with {lost} of {len(values)} seeds")
    mean = float(np.mean(np.subtract(ours, theirs)))
    with warnings.catch_warnings():
        # scipy warns of differences that are all equal. Their interval is a point.
        warnings.simplefilter("ignore", RuntimeWarning)
        test = stats.ttest_rel(ours, theirs)
        interval = test.confidence_interval(1 - (1 - LEVEL) / comparisons)
    low, high = float(interval.low), float(interval.high)
    verdict = "lower" if high < 0 else "higher" if low > 0 else NO_DIFFERENCE
    return Difference(mean, low, high, verdict)


def good_rates(losses: Mapping[float, float], chosen: float) -> tuple[float, float]:
    """The lowest and the highest learning rate of those that are as good as the chosen one.

    That is, whose loss is at most ``TOLERANCE`` higher, as are those of all rates between.

    Args:
        losses: {learning rate: loss, inf if the run diverged}, of one seed.
        chosen: one of the rates. More seeds may have decided for it, so another may be lower here.
    """
    limit = losses[chosen] + TOLERANCE * abs(losses[chosen])
    rates = sorted(losses)
    position = rates.index(chosen)

    def is_good(rate: float) -> bool:
        return losses[rate] <= limit

    lower = takewhile(is_good, reversed(rates[:position]))
    higher = takewhile(is_good, rates[position + 1 :])
    return min((chosen, *lower)), max((chosen, *higher))


def running_mean(losses: Array) -> Array:
    """The mean over the last ``WINDOW`` of the steps, at each point; over fewer at the start.

    Args:
        losses: (..., points), one point for each step, or for equal numbers of steps.

    Returns:
        (..., points).
    """
    points = losses.shape[-1]
    window = max(1, round(WINDOW * points))
    sums = np.cumsum(losses, axis=-1)
    sums[..., window:] -= sums[..., :-window].copy()
    return sums / np.minimum(np.arange(1, points + 1), window)


def first_at_most(curve: Array, target: float) -> int | None:
    """The first index at which a curve is at most ``target``; None: never."""
    (reached,) = np.nonzero(curve <= target)
    return int(reached[0]) if len(reached) else None


def mean_and_sd(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean and standard deviation (of a sample) of at least two numbers; None: there are fewer."""
    if len(values) < 2:
        return None
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
