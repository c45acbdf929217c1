"""Grams of sharded matrices and products of their rows, on real ranks, against dense ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.layout import Layout, split_rows
from tests.core.test_flat_shard import relative_error
from tests.core.test_layout import KINDS, WORLDS, same_on_all
from tests.support.ranks import Ranks
from tests.support.workers import shards as work

StartRanks = Callable[[int], Ranks]
SHAPES = [
    [(31, 24), (13, 24), (31, 24), (1, 24), (2, 24)],
    [(31, 3), (24, 3), (31, 3), (1, 3), (7, 3), (25, 3)],
    [(5, 8), (1, 8), (5, 8)],
]


@pytest.mark.parametrize("room", [2**23, 30])
@pytest.mark.parametrize("shapes", SHAPES, ids=["24", "3", "8"])
@pytest.mark.parametrize(("world", "kind"), list(itertools.product(WORLDS, KINDS)))
def test_grams_of_many_matrices(
    ranks: StartRanks, world: int, kind: str, shapes: list[tuple[int, int]], room: int
) -> None:
    answers = ranks(world).run(work.grams, shapes, kind, room)
    for gram, ours, theirs in zip(
        same_on_all([grams for grams, _ in answers]),
        work.matrices(shapes, 0),
        work.matrices(shapes, 1),
        strict=True,
    ):
        side = torch.cat([ours, theirs], dim=1).double()
        assert gram.dtype == torch.float64
        assert relative_error(gram, side.T @ side) < 1e-14
    # FSDP2, for example, cuts no row in two. Then there is nothing to exchange.
    cuts = [np.array(work.CUTS[kind](shape, world)) for shape in shapes]
    shared = any(len(split_rows(cut, cols)) for cut, (_, cols) in zip(cuts, shapes, strict=True))
    calls = {"all_reduce": 1} | ({"all_to_all_single": 1} if shared else {})
    assert all(found == calls for _, found in answers)


@pytest.mark.parametrize(
    ("world", "shape", "ranges", "split"),
    [
        (3, (1, 8), [(0, 3), (3, 6), (6, 8)], [0]),  # ZeRO-3's cut of a single row
        (4, (2, 8), [(0, 2), (2, 5), (5, 11), (11, 16)], [0, 1]),  # three ranks share row 0
        (4, (2, 8), [(0, 4), (4, 8), (8, 12), (12, 16)], [0, 1]),  # ZeRO-3's
        (4, (2, 8), [(11, 16), (0, 2), (5, 11), (2, 5)], [0, 1]),  # in no order
        (4, (3, 8), [(0, 3), (3, 3), (3, 6), (6, 24)], [0]),  # a rank without a part between
        (2, (2, 8), [(0, 8), (8, 16)], []),
    ],
)
def test_gram_of_rows_on_several_ranks(
    ranks: StartRanks,
    world: int,
    shape: tuple[int, int],
    ranges: list[tuple[int, int]],
    split: list[int],
) -> None:
    answers = ranks(world).run(work.gram_of_ranges, shape, ranges)
    (gram,) = same_on_all([[gram] for gram, _ in answers])
    whole = work.matrices([shape])[0].double()
    assert relative_error(gram, whole.T @ whole) < 1e-14
    assert all(rows == split for _, rows in answers)


def test_gram_of_one_process() -> None:
    (whole,) = work.matrices([(31, 24)])
    shard = FlatShard(whole.flatten(), 0, (31, 24))
    gram = work.gram_of(Layout.of([shard]), shard)
    assert relative_error(gram, whole.double().T @ whole.double()) < 1e-14


@pytest.mark.parametrize("room", [2**23, 30])
@pytest.mark.parametrize("shapes", SHAPES, ids=["24", "3", "8"])
@pytest.mark.parametrize(("world", "kind"), list(itertools.product(WORLDS, KINDS)))
def test_rows_times_a_matrix(
    ranks: StartRanks, world: int, kind: str, shapes: list[tuple[int, int]], room: int
) -> None:
    found = same_on_all(ranks(world).run(work.mixed, shapes, kind, room))
    cols = shapes[0][1]
    mixes = work.matrices([(2 * cols, cols)] * len(shapes), 2)
    for product, ours, theirs, mix in zip(
        found, work.matrices(shapes, 0), work.matrices(shapes, 1), mixes, strict=True
    ):
        expected = torch.cat([ours, theirs], dim=1).double() @ mix.double()
        assert relative_error(product, expected) < 1e-6
