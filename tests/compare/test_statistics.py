"""The statistics of a study, against scipy, tables and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from scalora_dist.compare import statistics
from scalora_dist.compare.statistics import NO_DIFFERENCE, paired_difference


@pytest.mark.parametrize(
    ("comparisons", "half"),
    # t(4) at 0.975 and 0.9875 is 2.776 and 3.495; the standard error is √2.5 / √5.
    [(1, 2.776 * 0.70711), (2, 3.495 * 0.70711)],
)
def test_an_interval_is_that_of_the_tables(comparisons: int, half: float) -> None:
    found = paired_difference([1, 3, 3, 7, 6], [0, 1, 0, 3, 1], comparisons)
    assert found.mean == 3.0
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), abs=1e-3)
    assert found.verdict == "higher"


def test_an_interval_agrees_with_the_one_sample_test_of_the_differences() -> None:
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(1.0, 0.1, 7), generator.normal(1.3, 0.1, 7)
    found = paired_difference(ours.tolist(), theirs.tolist(), 3)
    other = stats.ttest_1samp(ours - theirs, 0).confidence_interval(1 - 0.05 / 3)
    assert (found.low, found.high) == pytest.approx((other.low, other.high))
    assert found.verdict == "lower"
    back = paired_difference(theirs.tolist(), ours.tolist(), 3)
    assert back.mean == pytest.approx((theirs - ours).mean())
    assert back.verdict == "higher"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([1.0, 2.0, 4.0], NO_DIFFERENCE),
        ([1.0, 2.0, 3.0], NO_DIFFERENCE),  # all differences are 0
        ([0.5, 1.5, 2.5], "lower"),  # all differences are equal
        ([1.0, math.inf, math.inf], "diverged with 2 of 3 seeds"),
    ],
)
def test_verdicts(ours: list[float], verdict: str) -> None:
    found = paired_difference(ours, [1.0, 2.0, 3.0], 1)
    assert found.verdict == verdict
    assert (found.mean is None) == (found.low is None) == math.isinf(max(ours))


def test_a_method_whose_baseline_diverged_is_not_judged() -> None:
    found = paired_difference([1.0, 2.0], [1.0, math.inf], 1)
    assert (found.mean, found.verdict) == (None, "the other diverged with 1 of 2 seeds")


def test_a_running_mean_is_that_of_a_loop() -> None:
    losses = np.random.default_rng(0).normal(size=(2, 60))  # the window has 3 points
    found = statistics.running_mean(losses)
    for point in range(60):
        window = losses[:, max(0, point - 2) : point + 1]
        np.testing.assert_allclose(found[:, point], window.mean(axis=1))


def test_good_rates() -> None:
    losses = {1e-4: 1.06, 1e-3: 1.04, 1e-2: 1.0, 1e-1: 1.049, 1.0: math.inf}
    assert statistics.good_rates(losses, 1e-2) == (1e-3, 1e-1)
    # A rate that more seeds decided against may be lower with this one.
    assert statistics.good_rates({1e-3: 1.0, 2e-3: 0.5, 4e-3: 3.0}, 1e-3) == (1e-3, 2e-3)
    # A good rate beyond a bad one is not in the range.
    assert statistics.good_rates({1e-3: 1.0, 3e-3: 5.0, 1e-2: 1.02}, 1e-3) == (1e-3, 1e-3)
