"""FlatShard and Layout: every way to cut up a matrix against the dense one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scalora_dist.core.flat_shard import FlatShard, Layout, global_norm, split_rows
from tests.support.ranks import Ranks
from tests.support.workers import shards as work

SHAPES = [(31, 24), (13, 11), (25, 6), (1, 7), (31, 3), (24, 3), (13, 8), (11, 8)]
# Local operations never use the group; a matrix that is cut up only needs to have one.
CUT: Any = object()

Ranges = list[tuple[int, int]]
StartRanks = Callable[[int], Ranks]


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


@pytest.mark.parametrize(("shape", "ranges"), CASES)
def test_split_rows_by_counting_owners(shape: tuple[int, int], ranges: Ranges) -> None:
    owner = torch.full((math.prod(shape),), -1)
    for rank, (low, high) in enumerate(ranges):
        owner[low:high] = rank
    assert (owner >= 0).all()
    expected = [i for i, row in enumerate(owner.view(shape).tolist()) if len(set(row)) > 1]
    assert split_rows(torch.tensor(ranges), shape[1]).tolist() == expected


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "ranges"), CASES)
def test_scale_columns(shape: tuple[int, int], ranges: Ranges, dtype: torch.dtype) -> None:
    (whole,) = work.matrices([shape])
    whole, scale = whole.to(dtype), torch.linspace(-3, 1.7, shape[1], dtype=torch.float64)
    shards = cut_up(whole, ranges)
    for shard in shards:
        shard.scale_columns_(scale)
    # 16-bit columns are scaled in fp32 and rounded once, all others in their own dtype.
    working = torch.promote_types(dtype, torch.float32)
    expected = (whole.to(working) * scale.to(working)).to(dtype)
    assert torch.equal(put_together(shards), expected)
    exact = whole.double() * scale
    assert relative_error(expected, exact) <= torch.finfo(dtype).eps


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
        shard.scale_columns_(torch.full((n,), 2.0))
        shard.add_low_rank_(left, right)
        expected = (2 * whole + left @ right.T).flatten()[low:high]
        torch.testing.assert_close(storage[padding:-padding], expected, rtol=1e-5, atol=1e-5)
        assert (storage[:padding] == 7).all() and (storage[-padding:] == 7).all()


def test_one_process_needs_no_group() -> None:
    shapes = [(31, 24), (13, 11)]
    wholes = work.matrices(shapes)
    shards = [FlatShard(w.flatten(), 0, shape) for w, shape in zip(wholes, shapes, strict=True)]
    layout = Layout.of(shards)
    grams = layout.grams([(shard,) for shard in shards])
    for whole, shard, gram in zip(wholes, shards, grams, strict=True):
        assert gram.dtype == torch.float64
        assert relative_error(gram, whole.double().T @ whole.double()) < 1e-14
        assert torch.equal(shard.gram(), gram)
    for whole, gathered in zip(wholes, layout.gather(shards, range(2)), strict=True):
        assert torch.equal(whole, gathered)
    expected = torch.cat([whole.double().flatten() for whole in wholes]).norm()
    assert global_norm(shards, torch.device("cpu")) == pytest.approx(float(expected), rel=1e-14)


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


def test_one_layout_has_one_group() -> None:
    whole, part = FlatShard(torch.zeros(12), 0, (3, 4)), FlatShard(torch.zeros(5), 0, (3, 4), CUT)
    with pytest.raises(ValueError, match="one process group"):
        Layout.of([whole, part])


# --- real ranks ----------------------------------------------------------------------------------

WORLDS = [2, 3, 4]
KINDS = list(work.CUTS)


def same_on_all(answers: list[list[Tensor]]) -> list[Tensor]:
    """Rank 0's tensors, if every rank's are the same bit for bit."""
    for other in answers[1:]:
        for ours, theirs in zip(answers[0], other, strict=True):
            assert torch.equal(ours, theirs)
    return answers[0]


@pytest.mark.parametrize(("world", "kind"), list(itertools.product(WORLDS, KINDS)))
def test_grams_of_many_matrices_are_one_all_reduce(
    ranks: StartRanks, world: int, kind: str
) -> None:
    answers = ranks(world).run(work.grams, SHAPES, kind)
    for gram, ours, theirs in zip(
        same_on_all([grams for grams, _ in answers]),
        work.matrices(SHAPES, 0),
        work.matrices(SHAPES, 1),
        strict=True,
    ):
        side = torch.cat([ours, theirs], dim=1).double()
        assert gram.dtype == torch.float64
        assert relative_error(gram, side.T @ side) < 1e-14
    assert all(calls == {"all_reduce": 1} for _, calls in answers)


@pytest.mark.parametrize(
    ("world", "shape", "ranges", "split"),
    [
        (3, (1, 8), [(0, 3), (3, 6), (6, 8)], [0]),  # ZeRO-3's cut of a single row
        (4, (2, 8), [(0, 2), (2, 5), (5, 11), (11, 16)], [0, 1]),  # three ranks share row 0
        (4, (2, 8), [(0, 4), (4, 8), (8, 12), (12, 16)], [0, 1]),  # ZeRO-3's
        (4, (2, 8), [(11, 16), (0, 2), (5, 11), (2, 5)], [0, 1]),  # in no order
        (2, (2, 8), [(0, 8), (8, 16)], []),
    ],
)
def test_gram_of_rows_on_several_ranks(
    ranks: StartRanks, world: int, shape: tuple[int, int], ranges: Ranges, split: list[int]
) -> None:
    answers = ranks(world).run(work.gram_of_ranges, shape, ranges)
    (gram,) = same_on_all([[gram] for gram, _ in answers])
    whole = work.matrices([shape])[0].double()
    assert relative_error(gram, whole.T @ whole) < 1e-14
    assert all(rows == split for _, rows in answers)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("bucket_bytes", [2**30, 4 * 200, 1])
@pytest.mark.parametrize(("world", "kind"), list(itertools.product(WORLDS, KINDS)))
def test_gather_in_buckets(
    ranks: StartRanks, world: int, kind: str, bucket_bytes: int, together: int
) -> None:
    answers = ranks(world).run(work.gathered, SHAPES, kind, bucket_bytes, together)
    for whole, expected in zip(
        same_on_all([wholes for wholes, _, _ in answers]), work.matrices(SHAPES), strict=True
    ):
        assert torch.equal(whole, expected)
    sizes = [4 * math.prod(shape) for shape in SHAPES]
    for _, buckets, calls in answers:
        assert [i for bucket in buckets for i in bucket] == list(range(len(SHAPES)))
        assert all(len(bucket) % together == 0 for bucket in buckets)
        for bucket in buckets:  # over the limit only where nothing could be left out
            assert len(bucket) == together or sum(sizes[i] for i in bucket) <= bucket_bytes
        assert calls["all_gather_into_tensor"] == len(buckets)
        assert set(calls) == {"all_gather_into_tensor", "gathered elements"}
        if bucket_bytes == 2**30:
            assert len(buckets) == 1
        if bucket_bytes == 1:
            assert len(buckets) == len(SHAPES) // together


@pytest.mark.parametrize(("world", "kind"), list(itertools.product(WORLDS, KINDS)))
def test_global_norm(ranks: StartRanks, world: int, kind: str) -> None:
    norms = ranks(world).run(work.norm, SHAPES, kind)
    expected = torch.cat([w.double().flatten() for w in work.matrices(SHAPES)]).norm()
    assert norms[0] == pytest.approx(float(expected), rel=1e-14)
    assert norms == norms[:1] * world


@pytest.mark.parametrize("world", WORLDS)
def test_rescales_collectives_do_not_depend_on_the_number_of_layers(
    ranks: StartRanks, world: int
) -> None:
    few = ranks(world).run(work.rescale_collectives, 2)
    many = ranks(world).run(work.rescale_collectives, 12)
    for (first_few, each_few), (first_many, each_many) in zip(few, many, strict=True):
        gathered = each_many.pop("gathered elements")
        assert gathered < 12 * 31 * 24  # A, B, α and β; never a W
        del each_few["gathered elements"]
        # Grams; then one gather of the scales and one bucket of factors.
        assert each_few == each_many == {"all_reduce": 1, "all_gather_into_tensor": 2}
        assert first_few["all_gather_into_tensor"] == first_many["all_gather_into_tensor"] == 1
        assert set(first_many) == {"all_gather_into_tensor", "gathered elements"}
