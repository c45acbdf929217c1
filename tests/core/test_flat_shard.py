"""FlatShard: every way to cut up a matrix against the dense one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scalora_dist.core.flat_shard import FlatShard
from tests.support.workers import shards as work

SHAPES = [(31, 24), (13, 11), (25, 6), (1, 7), (31, 3), (24, 3), (13, 8), (11, 8)]
# Local operations never use the group; a matrix that is cut up only needs to have one.
CUT: Any = object()

Ranges = list[tuple[int, int]]


def one_process(shape: tuple[int, int], world: int) -> Ranges:
    return [(0, math.prod(shape))]


CASES = [
    pytest.param(shape, cut(shape, world), id=f"{shape[0]}x{shape[1]}-{kind}-{world}")
    for shape in SHAPES
    for kind, cut in work.CUTS.items()
    if kind != "backwards"
    for world in (2, 4)
] + [
    pytest.param(shape, one_process(shape, 1), id=f"{shape[0]}x{shape[1]}-whole")
    for shape in SHAPES
]


def cut_up(whole: Tensor, ranges: Ranges) -> list[FlatShard]:
    return [work.shard_of(whole, span, CUT) for span in ranges]


def put_together(shards: list[FlatShard]) -> Tensor:
    """The dense matrix; every element must be somewhere exactly once."""
    shape = shards[0].shape
    whole, count = torch.zeros(math.prod(shape), dtype=shards[0].local.dtype), 0
    for shard in shards:
        whole[shard.offset : shard.offset + shard.local.numel()] = shard.local
        count += shard.local.numel()
    assert count == whole.numel()
    return whole.view(shape)


def relative_error(value: Tensor, true: Tensor) -> float:
    return float((value.double() - true.double()).norm() / true.double().norm())


# --- how the engines cut -------------------------------------------------------------------------


def test_fsdp2_rows_are_torch_chunks() -> None:
    assert work.fsdp2((25, 6), 2) == [(0, 13 * 6), (13 * 6, 25 * 6)]
    assert work.fsdp2((1, 7), 2) == [(0, 7), (7, 7)]


# --- local operations ----------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [None, 1, 4])
@pytest.mark.parametrize(("shape", "ranges"), CASES)
def test_pieces_tile_the_range(
    shape: tuple[int, int], ranges: Ranges, max_rows: int | None
) -> None:
    whole = torch.arange(math.prod(shape)).double().view(shape)
    for shard in cut_up(whole, ranges):
        position = 0
        for piece in shard.pieces(max_rows):
            assert piece.flat.start == position and piece.block.numel() > 0
            assert torch.equal(piece.block, whole[piece.rows, piece.cols])
            assert torch.equal(piece.block.flatten(), shard.local[piece.flat])
            assert len(piece.block) <= (max_rows or shape[0])
            piece.block.fill_(-1.0)
            position = piece.flat.stop
        assert position == shard.local.numel()
        assert (shard.local == -1).all()


@pytest.mark.parametrize(("shape", "ranges"), CASES)
def test_pieces_without_a_limit_are_at_most_three(shape: tuple[int, int], ranges: Ranges) -> None:
    for shard in cut_up(torch.zeros(shape), ranges):
        assert len(list(shard.pieces())) <= 3


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 2e-7)], ids=["f64", "f32"]
)
@pytest.mark.parametrize(("shape", "ranges"), CASES)
def test_add_low_rank(
    shape: tuple[int, int], ranges: Ranges, rank: int, dtype: torch.dtype, tolerance: float
) -> None:
    m, n = shape
    whole, left, right = (t.to(dtype) for t in work.matrices([shape, (m, rank), (n, rank)]))
    shards = cut_up(whole, ranges)
    for shard in shards:
        shard.add_low_rank_(left, right)
    expected = whole.double() + left.double() @ right.double().T
    assert relative_error(put_together(shards), expected) < tolerance


@pytest.mark.parametrize(("shape", "ranges"), CASES)
def test_padded_rows_add_up_to_the_matrix(shape: tuple[int, int], ranges: Ranges) -> None:
    (whole,) = work.matrices([shape])
    total = torch.zeros(shape)
    for shard in cut_up(whole, ranges):
        first, rows = shard.padded_rows()
        assert rows.shape[1] == shape[1]
        total[first : first + len(rows)] += rows
        aligned = shard.offset % shape[1] == 0 and shard.local.numel() % shape[1] == 0
        if aligned and len(rows):
            assert rows.data_ptr() == shard.local.data_ptr()  # a view: nothing was copied
    assert torch.equal(total, whole)


@pytest.mark.parametrize(("shape", "ranges"), CASES)
def test_writes_reach_the_engines_storage_and_nothing_beside_it(
    shape: tuple[int, int], ranges: Ranges
) -> None:
    (whole,) = work.matrices([shape])
    m, n = shape
    _, left, right = work.matrices([shape, (m, 3), (n, 3)], seed=1)
    for low, high in ranges:
        padding = 5
        storage = torch.full((high - low + 2 * padding,), 7.0)
        storage[padding:-padding] = whole.flatten()[low:high]
        shard = FlatShard(storage[padding:-padding], low, shape, CUT)
        shard.add_low_rank_(left, right)
        expected = (whole + left @ right.T).flatten()[low:high]
        torch.testing.assert_close(storage[padding:-padding], expected, rtol=1e-5, atol=1e-5)
        assert (storage[:padding] == 7).all() and (storage[-padding:] == 7).all()


@pytest.mark.parametrize(
    ("local", "offset", "group"),
    [
        (torch.zeros(3, 4), 0, CUT),  # not flat
        (torch.zeros(12), 1, CUT),  # runs over the end
        (torch.zeros(11), 0, None),  # a part without a group
    ],
    ids=["2-D", "beyond", "part"],
)
def test_a_range_outside_the_matrix_is_an_error(local: Tensor, offset: int, group: Any) -> None:
    with pytest.raises(ValueError, match="3, 4"):
        FlatShard(local, offset, (3, 4), group)
