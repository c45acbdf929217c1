"""Steps that had to be skipped, losses that jump, and what a run does about them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from scalora_dist.training.health import ENOUGH, SPIKE_DEVIATIONS, loss_spike, skipped_in_a_row


def records(*skipped: bool) -> list[dict[str, Any]]:
    return [{"loss": 1.0} | ({"skipped_step": True} if skip else {}) for skip in skipped]


@pytest.mark.parametrize(
    ("skipped", "count"),
    [((), 0), ((False,), 0), ((True, False), 0), ((True, False, True, True), 2), ((True,) * 3, 3)],
)
def test_skipped_steps_are_counted_from_the_end(skipped: tuple[bool, ...], count: int) -> None:
    assert skipped_in_a_row(records(*skipped)) == count


def losses(*values: float) -> list[dict[str, Any]]:
    return [{"step": i, "loss": value} for i, value in enumerate(values)]


STEADY = [2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0, 2.1, 1.9, 2.0]  # median 2, deviation 0.14826


def test_a_jump_is_told_in_deviations() -> None:
    jump = 2 + 10 * 0.14826
    assert loss_spike(losses(*STEADY), jump) == pytest.approx(10, rel=1e-6)
    assert loss_spike(losses(*STEADY), 2 + (SPIKE_DEVIATIONS - 0.01) * 0.14826) is None
    assert loss_spike(losses(*STEADY), 0.0) is None  # a fall is no spike


def test_too_few_losses_say_nothing() -> None:
    assert loss_spike(losses(*STEADY[: ENOUGH - 1]), 100.0) is None
    assert loss_spike([], 100.0) is None


def test_one_earlier_spike_does_not_hide_the_next() -> None:
    assert loss_spike(losses(*STEADY, 1000.0), 10.0) is not None


def test_what_is_not_finite_is_no_spike() -> None:
    """It is a skipped step, and a skipped step's loss is not looked back at."""
    assert loss_spike(losses(*STEADY), math.nan) is None
    skipped = [{"loss": math.nan, "skipped_step": True}] * 30
    assert loss_spike(losses(*STEADY) + skipped, 3.5) == loss_spike(losses(*STEADY), 3.5)


def test_equal_losses_have_no_deviation() -> None:
    assert loss_spike(losses(*[2.0] * ENOUGH), 100.0) is None
