"""Steps that had to be skipped, losses that jump, and what a run does about them."""

from __future__ import annotations

import json
import math

import pytest

from scalora_dist.training.health import ENOUGH, SPIKE_DEVIATIONS, WINDOW, Health
from scalora_dist.training.progress import Progress


def after(*losses: float, skipped: int = 0) -> Health:
    """The health of a run after steps with these losses, then ``skipped`` steps."""
    health = Health()
    for loss in losses:
        health.note({"loss": loss})
    for _ in range(skipped):
        health.note({"loss": math.nan, "skipped_step": True})
    return health


def test_skipped_steps_are_counted_in_a_row() -> None:
    health, counts = Health(), []
    for skipped in (False, True, False, True, True, False, True, True, True):
        health.note({"loss": 1.0} | ({"skipped_step": True} if skipped else {}))
        counts.append(health.skipped_in_a_row)
    assert counts == [0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert after(skipped=3 * WINDOW).skipped_in_a_row == 3 * WINDOW


STEADY = [2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0, 2.1, 1.9, 2.0]  # median 2, deviation 0.14826


def test_a_jump_is_told_in_deviations() -> None:
    jump = 2 + 10 * 0.14826
    assert after(*STEADY).spike(jump) == pytest.approx(10, rel=1e-6)
    assert after(*STEADY).spike(2 + (SPIKE_DEVIATIONS - 0.01) * 0.14826) is None
    assert after(*STEADY).spike(0.0) is None  # a fall is no spike


def test_too_few_losses_say_nothing() -> None:
    assert after(*STEADY[: ENOUGH - 1]).spike(100.0) is None
    assert after().spike(100.0) is None


def test_one_earlier_spike_does_not_hide_the_next() -> None:
    assert after(*STEADY, 1000.0).spike(10.0) is not None


def test_what_is_not_finite_is_no_spike() -> None:
    """It is a skipped step, and a skipped step's loss is not looked back at."""
    assert after(*STEADY).spike(math.nan) is None
    assert after(*STEADY, skipped=30).spike(3.5) == after(*STEADY).spike(3.5)


def test_losses_before_the_window_are_forgotten() -> None:
    assert after(*STEADY, *[9.0] * WINDOW).spike(9.1) is None
    assert after(*STEADY, skipped=WINDOW).spike(100.0) is None


def test_equal_losses_have_no_deviation() -> None:
    assert after(*[2.0] * ENOUGH).spike(100.0) is None


def test_a_checkpoint_holds_it() -> None:
    """Through JSON: the same answer to the same loss."""
    health, restored = after(*STEADY, skipped=2), Health()
    vars(restored).update(json.loads(json.dumps(vars(health))))
    assert restored.spike(5.0) == health.spike(5.0) is not None
    assert restored.skipped_in_a_row == 2


def test_a_checkpoint_holds_what_was_when_it_began() -> None:
    """Training goes on while it is written."""
    progress = Progress()
    progress.note({"step": 1, "loss": 1.0, "tokens": 1, "seconds": 1.0})
    state = progress.state()
    before = json.dumps(state)
    progress.note({"step": 2, "loss": math.nan, "skipped_step": True, "tokens": 1, "seconds": 1.0})
    assert json.dumps(state) == before
