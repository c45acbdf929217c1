"""Collectives, right and wrong ones, on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scalora_dist.doctor.network import COLLECTIVES
from tests.support.workers import doctor as work


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_wrong_result_is_found_with_its_dtype_and_rank(ranks: Any, name: str) -> None:
    right = ranks(3).run(work.collective, name, {})[0]
    assert right.advice is None and "bf16" in right.found and " GB/s" in right.found
    for found in ranks(3).run(work.collective, name, {1: torch.bfloat16}):
        assert found.failed
        assert found.found == "wrong in bf16 on 1 of 3 ranks, the first is rank 1"


def test_rates_within_a_node_and_between_nodes(ranks: Any) -> None:
    within = ranks(2).run(work.interconnect, 2)[0].found
    assert within.endswith(" GB/s within a node (2 ranks)") and "between" not in within
    between = ranks(2).run(work.interconnect, 1)[0].found
    assert between.endswith(" GB/s between nodes (2 ranks)") and "within" not in between
