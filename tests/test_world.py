"""Waiting for rank 0, and the small sums, on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import world_work


@pytest.mark.parametrize("size", [1, 3])
def test_rank_0_fills_the_cache_and_the_others_read_it(
    ranks: Any, tmp_path: Path, size: int
) -> None:
    answers = ranks(size).run(world_work.cached, tmp_path)
    assert answers == [(rank > 0, "made") for rank in range(size)]


def test_all_ranks_hear_of_rank_0s_mistake(ranks: Any) -> None:
    assert ranks(3).run(world_work.refusal) == ["seen by rank 0"] * 3


def test_reductions(ranks: Any) -> None:
    assert ranks(3).run(world_work.reductions) == [[3.0, 3.0, 2.0, 0.0]] * 3
