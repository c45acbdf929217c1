"""16-bit merges against an fp32 master, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scalora_dist.core import split_precision as module
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.split_precision import (
    add_low_rank_,
    join_halves,
    split_halves,
    zero_low_half,
)
from tests.support.workers import shards as work

SHAPE, RANK, MERGES = (31, 24), 3, 1000
BF16_MAX = torch.finfo(torch.bfloat16).max
CUT: Any = object()  # merges are local: the group is never used


def bits(value: Tensor) -> Tensor:
    return value.view(torch.int32)


def random_bits(count: int = 2**18) -> Tensor:
    """fp32 numbers of any exponent and sign, finite; subnormals too."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64)
    value = value.to(torch.int32).view(torch.float32)
    return value[value.isfinite()]


def special_values() -> Tensor:
    """Zeros, powers of two and bfloat16 ties (low half 0x8000), with their neighbours, ±."""
    powers = torch.tensor([2.0**k for k in range(-149, 128)])
    highs = torch.arange(0x0001, 0x7F7F, 37, dtype=torch.int32)
    ties = (highs * 2**16 + 0x8000).view(torch.float32)
    centre = torch.cat([torch.zeros(1), powers, ties])
    around = [(bits(centre) + step).clamp_min(0).view(torch.float32) for step in (-1, 0, 1)]
    value = torch.cat(around)
    return torch.cat([value, -value])


def exact_factors(step: int) -> tuple[Tensor, Tensor]:
    """Factors of few bits: every order of summing their product gives the same fp32 increment.

    Its entries are mostly positive, so that 1000 of them add up, and far below a bfloat16 weight's
    half unit in the last place.
    """
    generator = torch.Generator().manual_seed(step)
    left = torch.randint(-3, 9, (SHAPE[0], RANK), generator=generator) * 2.0**-10
    right = torch.randint(-3, 9, (SHAPE[1], RANK), generator=generator) * 2.0**-10
    return left, right


def weight(dtype: torch.dtype) -> Tensor:
    (whole,) = work.matrices([SHAPE])
    return whole.to(dtype)


# --- two halves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [random_bits, special_values])
def test_bfloat16_halves_are_exact(values: Any) -> None:
    value = values()
    high, low = split_halves(value, torch.bfloat16)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(bits(join_halves(high, low)), bits(value))  # -0.0 included


@pytest.mark.parametrize("values", [random_bits, special_values])
def test_bfloat16_high_half_is_a_nearest_number(values: Any) -> None:
    value = values()
    value = value[value.abs() <= BF16_MAX]
    high, _ = split_halves(value, torch.bfloat16)
    exact = value.double()
    nearest = (value.to(torch.bfloat16).double() - exact).abs()
    assert torch.equal((high.double() - exact).abs(), nearest)
    # Half a unit in the last place: 2⁻⁸ of the power of two below (2⁻¹³⁴ where subnormal).
    half = torch.exp2(torch.frexp(exact).exponent.clamp_min(-125).double() - 1 - 8)
    assert ((high.double() - exact).abs() <= half).all()


def test_ties_go_away_from_zero() -> None:
    tie = torch.tensor([1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8])
    high, low = split_halves(tie, torch.bfloat16)
    assert high.tolist() == [1 + 2**-7, -1 - 2**-7, 1 + 2**-6]
    assert low.tolist() == [-(2**15)] * 3


def float16_values() -> Tensor:
    value = torch.cat([random_bits(2**20), special_values()])
    return value[value.abs() < 65520]  # what rounds to a finite float16


def test_float16_halves_are_exact_down_to_2_to_the_minus_16() -> None:
    value = float16_values()
    value = value[value.abs() >= 2.0**-16]
    high, low = split_halves(value, torch.float16)
    assert high.isfinite().all()
    assert torch.equal(bits(join_halves(high, low)), bits(value))


def test_float16_halves_are_near_below() -> None:
    value = float16_values()
    value = value[value.abs() < 2.0**-16]
    joined = join_halves(*split_halves(value, torch.float16))
    assert ((joined.double() - value.double()).abs() <= 2.0**-25).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_untouched_weight_has_no_remainder(dtype: torch.dtype) -> None:
    high = weight(dtype)
    shard = FlatShard(high.flatten(), 0, SHAPE)
    low = zero_low_half(shard)
    assert low.dtype == torch.int16 and low.shape == shard.local.shape
    assert torch.equal(join_halves(shard.local, low), shard.local.float())
    again, rest = split_halves(high.float(), dtype)
    assert torch.equal(again, high) and not rest.any()


# --- merges --------------------------------------------------------------------------------------


def many_merges(
    dtype: torch.dtype, span: tuple[int, int], *, split: bool
) -> tuple[FlatShard, Tensor | None]:
    shard = work.shard_of(weight(dtype), span, CUT)
    low = zero_low_half(shard) if split else None
    for step in range(MERGES):
        add_low_rank_(shard, *exact_factors(step), low)
    return shard, low


def masters(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What an fp32 weight and a float64 one become, dense."""
    single, double = weight(dtype).float(), weight(dtype).double()
    for step in range(MERGES):
        left, right = exact_factors(step)
        single = left @ right.T + single
        double = left.double() @ right.double().T + double
    return single, double


WHOLE = (0, SHAPE[0] * SHAPE[1])


@pytest.mark.parametrize("span", [WHOLE, (17, 500), (30, 41), (24, 72)])
def test_split_bfloat16_is_an_fp32_master(span: tuple[int, int]) -> None:
    shard, low = many_merges(torch.bfloat16, span, split=True)
    assert low is not None
    single, double = (master.flatten()[slice(*span)] for master in masters(torch.bfloat16))
    start = weight(torch.bfloat16).double().flatten()[slice(*span)]
    assert torch.equal(bits(join_halves(shard.local, low)), bits(single))
    drift = (join_halves(shard.local, low).double() - double).norm()
    assert drift < 1e-3 * (double - start).norm()
    nearest, _ = many_merges(torch.bfloat16, span, split=False)
    assert (nearest.local.double() - double).norm() > 100 * drift
    assert (nearest.local.double() - double).norm() > 0.1 * (double - start).norm()


def test_split_float16_keeps_what_nearest_loses() -> None:
    shard, low = many_merges(torch.float16, WHOLE, split=True)
    assert low is not None
    _, double = masters(torch.float16)
    moved = (double - weight(torch.float16).double()).norm()
    drift = (join_halves(shard.local, low).double() - double.flatten()).norm()
    assert drift < 1e-3 * moved
    nearest, _ = many_merges(torch.float16, WHOLE, split=False)
    assert (nearest.local.double() - double.flatten()).norm() > 10 * drift


def test_an_fp32_weight_takes_merges_as_they_are() -> None:
    shard, _ = many_merges(torch.float32, WHOLE, split=False)
    assert torch.equal(shard.local.view(SHAPE), masters(torch.float32)[0])


def test_nearest_rounds_the_sum_once() -> None:
    whole = weight(torch.bfloat16)
    left, right = (1000 * factor for factor in exact_factors(0))
    shard = FlatShard(whole.flatten().clone(), 0, SHAPE)
    add_low_rank_(shard, left, right, None)
    expected = (whole.float() + left @ right.T).to(torch.bfloat16)
    assert torch.equal(shard.local.view(SHAPE), expected)
    assert not torch.equal(expected, whole)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("elements", [1, 24 * 4, 24 * 7 + 5])
def test_chunks_change_no_bit(monkeypatch: pytest.MonkeyPatch, elements: int, split: bool) -> None:
    def merged() -> tuple[Tensor, Tensor]:
        shard = work.shard_of(weight(torch.bfloat16), (17, 700), CUT)
        low = zero_low_half(shard)
        for step in range(5):
            add_low_rank_(shard, *exact_factors(step), low if split else None)
        return shard.local, low

    usual = merged()
    monkeypatch.setattr(module, "SCRATCH_ELEMENTS", elements)
    longest = max(1, elements // SHAPE[1])
    seen = []
    pieces = FlatShard.pieces

    def watched(shard: FlatShard, max_rows: int | None = None) -> Any:
        for piece in pieces(shard, max_rows):
            seen.append(len(piece.block))
            yield piece

    monkeypatch.setattr(FlatShard, "pieces", watched)
    chunked = merged()
    assert max(seen) == longest  # the scratch was really that small
    assert all(torch.equal(a, b) for a, b in zip(usual, chunked, strict=True))
