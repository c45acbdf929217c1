"""truncated_svd against the exact SVD in float64, whole and cut up over real ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from scalora_dist.core import sharded_svd as module
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.sharded_svd import TruncatedSVD, truncated_svd
from tests.support.ranks import Ranks
from tests.support.workers import shards as shard_work
from tests.support.workers import svd as work

StartRanks = Callable[[int], Ranks]


def whole_svd(whole: Tensor, rank: int, seed: int = 0) -> TruncatedSVD:
    shape = (len(whole), whole.shape[1])
    return truncated_svd(FlatShard(whole.flatten(), 0, shape), rank, device="cpu", seed=seed)


def subspace_error(found: Tensor, exact: Tensor) -> float:
    """‖UUᵀ − ÛÛᵀ‖₂ = ‖U − Û(ÛᵀU)‖₂, the sine of the largest angle between the two."""
    return float(torch.linalg.matrix_norm(found - exact @ (exact.T @ found), 2))


def check_form(svd: TruncatedSVD, whole: Tensor, rank: int) -> None:
    """Shapes, dtype, order, signs, orthonormality."""
    m, n = whole.shape
    assert svd.U.shape == (m, rank) and svd.S.shape == (rank,) and svd.V.shape == (n, rank)
    assert all(t.dtype == torch.float64 and t.isfinite().all() for t in svd)
    assert (svd.S >= 0).all() and (svd.S.diff() <= 0).all()
    for side in (svd.U, svd.V):
        torch.testing.assert_close(side.T @ side, torch.eye(rank).double(), rtol=0, atol=1e-12)
    assert (svd.U.gather(0, svd.U.abs().argmax(0, keepdim=True)) > 0).all()


def check_triples(
    svd: TruncatedSVD, whole: Tensor, rank: int, values: float, spaces: float
) -> None:
    """Singular values and both subspaces, to the given relative errors, and M V = U diag(S)."""
    check_form(svd, whole, rank)
    U, S, Vh = torch.linalg.svd(whole.double(), full_matrices=False)
    assert float(((svd.S - S[:rank]) / S[:rank]).abs().max()) < values
    assert subspace_error(svd.U, U[:, :rank]) < spaces
    assert subspace_error(svd.V, Vh[:rank].T) < spaces
    assert float((whole.double() @ svd.V - svd.U * svd.S).norm() / S[0]) < 1e-6


def energy(svd: TruncatedSVD, whole: Tensor) -> float:
    """How much of the best rank-r approximation's energy U and V hold: at most 1."""
    rank = len(svd.S)
    held = torch.linalg.svdvals(svd.U.T @ whole.double() @ svd.V).square().sum()
    best = torch.linalg.svdvals(whole.double())[:rank].square().sum()
    assert float(svd.S.square().sum() / held) == pytest.approx(1, abs=1e-5)
    return float(held / best)


# --- one process ---------------------------------------------------------------------------------

DECAYING = 0.8 ** torch.arange(60).double()
GAP = torch.cat([torch.linspace(3, 2, 8), torch.ones(52)]).double()


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (700, 64), (64, 700)], ids=str)
@pytest.mark.parametrize("spectrum", [DECAYING, GAP], ids=["decaying", "gap"])
def test_decaying_spectrum_and_gap(spectrum: Tensor, shape: tuple[int, int]) -> None:
    whole = work.with_values(shape, spectrum)
    check_triples(whole_svd(whole, 8), whole, 8, values=1e-7, spaces=1e-4)
    check_triples(whole_svd(whole.float(), 8), whole, 8, values=1e-6, spaces=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_against_the_svd_of_the_same_values(dtype: torch.dtype) -> None:
    # More rows than are cast at a time.
    whole = work.with_values((2 * module.CAST_ROWS + 77, 60), 30 * GAP).to(dtype)
    check_triples(whole_svd(whole, 8), whole, 8, values=1e-6, spaces=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale_in_float32(scale: float) -> None:
    whole = (scale * work.with_values((90, 60), GAP)).float()
    check_triples(whole_svd(whole, 8), whole, 8, values=1e-6, spaces=1e-4)


def test_one_large_value_does_not_end_it_early() -> None:
    # Seven more are wanted that together hold 1e-4 of the energy: small, but not yet found.
    tail = torch.cat([torch.linspace(3e-3, 2e-3, 7), torch.linspace(1.9e-3, 1e-4, 392)])
    whole = work.with_values((600, 400), torch.cat([torch.ones(1), tail]).double())
    check_triples(whole_svd(whole.float(), 8), whole, 8, values=3e-5, spaces=0.1)


@pytest.mark.parametrize(
    ("shape", "rank"), [((512, 512), 8), ((768, 256), 4), ((256, 768), 32)], ids=str
)
def test_flat_spectrum_of_signs(shape: tuple[int, int], rank: int) -> None:
    whole = work.signs(shape)
    svd = whole_svd(whole, rank)
    check_form(svd, whole, rank)
    assert energy(svd, whole) >= 0.9999


def test_equal_singular_values() -> None:
    whole = work.with_values((200, 150), torch.full((150,), 2.0).double())
    svd = whole_svd(whole, 8)
    check_form(svd, whole, 8)
    assert energy(svd, whole) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (7, 1), (5, 5), (3, 200), (200, 3), (31, 24)], ids=str
)
def test_rank_as_large_as_the_matrix(shape: tuple[int, int]) -> None:
    (whole,) = shard_work.matrices([shape])
    rank = min(shape)
    svd = whole_svd(whole.double(), rank)
    check_form(svd, whole, rank)
    torch.testing.assert_close((svd.U * svd.S) @ svd.V.T, whole.double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(svd.S, torch.linalg.svdvals(whole.double()), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (12, 300), (300, 12)], ids=str)
def test_a_lower_rank_than_asked_for(
    shape: tuple[int, int], dtype: torch.dtype, rounding: float
) -> None:
    values = torch.tensor([5.0, 3, 2]).double()
    whole = work.with_values(shape, values).to(dtype)
    svd = whole_svd(whole, 8)
    check_form(svd, whole, 8)  # with columns beyond the third that complete a basis
    torch.testing.assert_close(svd.S[:3], values, rtol=1e-6, atol=0)
    assert float(svd.S[3]) < rounding * 5
    assert float(((svd.U * svd.S) @ svd.V.T - whole).norm()) < rounding * 10


def test_the_zero_matrix() -> None:
    whole = torch.zeros(90, 60)
    svd = whole_svd(whole, 8)
    check_form(svd, whole, 8)
    assert torch.equal(svd.S, torch.zeros(8).double())


def test_the_seed_draws_the_block() -> None:
    whole = work.signs((256, 256))
    first, again, other = (whole_svd(whole, 4, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.V, other.V)
    assert energy(other, whole) >= 0.9999


@pytest.mark.parametrize("rank", [0, 12])
def test_a_rank_beyond_the_matrix_is_an_error(rank: int) -> None:
    with pytest.raises(ValueError, match="1 … 11"):
        whole_svd(torch.ones(13, 11), rank)


# --- real ranks ----------------------------------------------------------------------------------

# Wanted singular values apart, so that not only the subspaces but the vectors are the matrix's own.
APART = torch.cat([torch.tensor([9.0, 7, 5, 4]), torch.linspace(2, 0.1, 37)]).double()
PROBLEMS = [
    (work.with_values((67, 41), APART).float(), 4),  # tall, odd
    (work.with_values((41, 67), APART).float(), 4),  # wide
    (work.with_values((2, 130), torch.tensor([3.0, 1]).double()).float(), 2),  # every row split
    (work.with_values((96, 41), APART).bfloat16(), 4),
    (work.with_values((67, 41), APART[:3]).double(), 4),  # of rank 3
    (torch.zeros(13, 11), 4),
]
SIGNS = work.signs((257, 255))


@pytest.mark.parametrize(
    ("world", "kind"),
    [(1, "zero3"), *((world, kind) for world in (2, 3, 4) for kind in shard_work.CUTS)],
)
def test_cut_up_as_engines_do(ranks: StartRanks, world: int, kind: str) -> None:
    answers = ranks(world).run(work.svds, [*PROBLEMS, (SIGNS, 8)], kind)
    for other in answers[1:]:
        for ours, theirs in zip(answers[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    *cut, flat = answers[0]
    check_form(flat, SIGNS, 8)
    assert energy(flat, SIGNS) >= 0.9999
    for (matrix, rank), svd in zip(PROBLEMS, cut, strict=True):
        check_form(svd, matrix, rank)
        one = whole_svd(matrix, rank)
        torch.testing.assert_close(svd.S, one.S, rtol=1e-6, atol=1e-12)
        independent = int((one.S > 1e-6).sum())  # the others are any completion
        for ours, theirs in ((svd.U, one.U), (svd.V, one.V)):
            difference = (ours - theirs)[:, :independent].abs()
            assert difference.numel() == 0 or float(difference.max()) < 1e-5
    for (matrix, rank), svd in zip(PROBLEMS[:4], cut[:4], strict=True):
        check_triples(svd, matrix, rank, values=1e-6, spaces=1e-4)


@pytest.mark.parametrize(
    ("world", "ranges"),
    [
        (4, [(0, 13), (13, 55), (55, 137), (137, 41 * 67)]),  # three ranks share row 0
        (4, [(40, 41), (41, 41 * 67), (0, 40), (7, 7)]),  # out of order, one element, an empty one
        (3, [(0, 0), (0, 41 * 67), (41 * 67, 41 * 67)]),  # one rank holds all
        (3, [(0, 41 * 20 + 1), (41 * 20 + 1, 41 * 21), (41 * 21, 41 * 67)]),
    ],
)
def test_cut_up_anywhere(ranks: StartRanks, world: int, ranges: shard_work.Ranges) -> None:
    whole, rank = PROBLEMS[0]
    answers = ranks(world).run(work.svd_of_ranges, whole, rank, ranges)
    for svd in answers:
        assert all(torch.equal(a, b) for a, b in zip(svd, answers[0], strict=True))
    check_triples(answers[0], whole, rank, values=1e-6, spaces=1e-4)


@pytest.mark.parametrize("kind", ["zero3", "fsdp2"])
def test_messages_are_small_blocks(ranks: StartRanks, kind: str) -> None:
    world, rank, (m, n) = 4, 3, (401, 307)
    whole = work.signs((m, n))
    block = rank + module.OVERSAMPLING
    largest = max((module.BLOCKS * block + world - 1) * block, n * block, m * rank)
    assert 20 * largest < math.prod(whole.shape)
    answers = ranks(world).run(work.messages, whole, rank, kind)
    for calls, sizes in answers:
        # One exchange of ranges, of two numbers a rank; then sums alone.
        assert calls == {
            "all_gather_into_tensor": 1,
            "gathered elements": 2 * world,
            "all_reduce": len(sizes),
        }
        assert sizes == answers[0][1] and max(sizes) <= largest
        # The first product, three sums a step, U: settled long before the last step.
        assert len(sizes) % 3 == 2 and 10 < len(sizes) < 2 * module.MAX_STEPS


def test_without_a_group_there_is_no_message(ranks: StartRanks) -> None:
    ((calls, svd),) = ranks(1).run(work.alone, PROBLEMS[0][0], 4)
    assert calls == {}
    check_triples(svd, PROBLEMS[0][0], 4, values=1e-6, spaces=1e-4)
