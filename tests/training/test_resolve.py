"""The sizes that follow from the rank."""

from __future__ import annotations

import pytest

from scalora_dist.config.method import MethodArguments
from scalora_dist.model_io.serving import SERVED_RANKS
from scalora_dist.training.resolve import resolve_merges


@pytest.mark.parametrize(
    ("rank", "exported"),
    [(1, 64), (2, 64), (8, 64), (9, 128), (16, 128), (32, 256), (40, 320), (41, 512), (64, 512)],
)
def test_a_carry_s_adapter_has_a_rank_that_servers_take(rank: int, exported: int) -> None:
    args = resolve_merges(MethodArguments(rank=rank), quantized=True)
    assert args.carry_rank == exported - rank and exported in SERVED_RANKS
    assert resolve_merges(args, quantized=True) == args


def test_a_rank_that_no_server_takes_or_that_is_given_is_kept() -> None:
    assert resolve_merges(MethodArguments(rank=65), quantized=True).carry_rank == 7 * 65
    given = MethodArguments(rank=8, carry_rank=24)
    assert resolve_merges(given, quantized=True).carry_rank == 24
