"""The time of collectives against ranks that are late on purpose."""

from __future__ import annotations

from typing import Any

from tests.support.workers import profile as profile_work
from tests.support.workers.profile import LATE


def test_waiting_for_a_late_rank_is_communication(ranks: Any) -> None:
    (waited, worked), late = ranks(2).run(profile_work.two_waits)
    for collective, alone in (waited, worked, *late):
        assert 0 <= alone <= collective
    assert waited[0] > 0.9 * LATE and waited[1] > 0.9 * LATE
    # Between two products of work there are moments without any.
    assert worked[0] > 0.9 * LATE and worked[1] < worked[0] / 2
    assert all(collective < LATE / 2 for collective, _ in late)
