"""Merges into carries that are cut up over ranks, against the same merges into dense float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.ranks import Ranks
from tests.support.workers import carry as work

HEAVY = pytest.mark.heavy
CASES = [
    (1, "zero3", torch.float32),
    (2, "zero3", torch.float32),
    (2, "fsdp2", torch.float32),
    pytest.param(3, "fsdp2", torch.float32, marks=HEAVY),
    pytest.param(4, "zero3", torch.float32, marks=HEAVY),
    (2, "zero3", torch.bfloat16),
    pytest.param(4, "zero3", torch.bfloat16, marks=HEAVY),
    pytest.param(2, "zero3", torch.float16, marks=HEAVY),
    pytest.param(4, "fsdp2", torch.bfloat16, marks=HEAVY),
    pytest.param(3, "zero3", torch.bfloat16, marks=HEAVY),
]


@pytest.mark.parametrize(("world", "kind", "dtype"), CASES)
def test_merges_arrive_but_for_what_is_said_to_be_lost(
    ranks: Callable[[int], Ranks], world: int, kind: str, dtype: torch.dtype
) -> None:
    """Nothing is lost by a merge that finds room; in 16 bits no more than in 32."""
    count = 9
    seen = ranks(world).run(work.merges, kind, dtype, count)
    compressed = 0
    for merge in range(count):
        for layer in seen[0][merge]:
            used, found, lost, right = seen[0][merge][layer]
            for other in seen[1:]:  # bit for bit: the ranks' shards would part otherwise
                assert other[merge][layer][0] == used and other[merge][layer][2] == lost
                assert torch.equal(other[merge][layer][1], found)
            error = float((found - right).norm())
            assert error <= lost + 1e-6 * float(right.norm())
            if merge < 4:  # 4 merges of 3 columns fit into 13
                assert lost == 0.0
                assert used == 3 * (merge + 1 - (merge >= 2 and layer != "0"))
            compressed += merge > 0 and lost > seen[0][merge - 1][layer][2]
            assert used <= work.CARRIED + work.ROOM
    # R is 6, and the updates' rank grows by 3 with each merge: what is lost is not rounding.
    assert compressed >= 6
    assert all(entry[2] > 1e-3 * float(entry[3].norm()) for entry in seen[0][-1].values())


def test_the_layers_need_not_be_full_at_the_same_time(ranks: Callable[[int], Ranks]) -> None:
    (seen,) = ranks(1).run(work.merges, "zero3", torch.float32, 6)
    used = [[entry[0] for entry in merge.values()] for merge in seen]
    assert used[2] == [9, 6, 6] and used[4] == [9, 12, 12]  # 6 kept and 3 new; full later
