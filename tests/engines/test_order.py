"""Weights are gathered after they were written, on devices that gather on a stream of its own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.workers import order


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_gathers_wait_for_writes(ranks: Any, engine: str) -> None:
    for found in ranks(2).run(order.late_gathers, engine):
        for missed in found.values():
            assert missed and set(missed) == {0}


def test_zero_3_waits_for_none_by_itself(ranks: Any) -> None:
    """So the test above tests our own wait."""
    for found in ranks(2).run(order.late_gathers, "zero3", ordered=False):
        assert all(set(missed) != {0} for missed in found.values())
