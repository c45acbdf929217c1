"""Adds a low-rank product to this rank's shard of a frozen weight, with fp32 precision.

An fp32 weight needs no special care. A 16-bit weight would round away an increment below half a
unit in the last place, although A and B did change. ``split`` keeps, beside each 16-bit weight, the
low 16 bits of the fp32 number that the weight stands for. ``nearest`` loses these bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalora_dist.core.flat_shard import FlatShard

# Number of elements of the fp32 buffer of a 16-bit merge.
SCRATCH_ELEMENTS = 2**24


def join_halves(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers that have the 16-bit roundings ``high`` and the remainders ``low``.

    Args:
        high: roundings, bfloat16 or float16, any shape.
        low: remainders, int16, same shape: the fp32 bits minus those of ``high`` cast to fp32.
    """
    return (high.float().view(torch.int32) + low).view(torch.float32)


def split_halves(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Splits fp32 values into (high, low); the inverse of ``join_halves``.

    ``high`` is the number of ``dtype`` nearest to each value. The split is exact for every finite
    value in bfloat16. In float16 it is exact from 2⁻¹⁶ up to the largest number; below 2⁻¹⁶ the
    error is at most 2⁻²⁵, half of the smallest step.
    """
    bits = value.view(torch.int32)
    # Setting the lowest bit breaks ties away from zero, so the remainder fits a signed int16.
    high = (bits | 1).view(torch.float32).to(dtype)
    low = bits - high.float().view(torch.int32)
    return high, low.clamp_(-(2**15), 2**15 - 1).to(torch.int16)


def add_low_rank_(weight: FlatShard, left: Tensor, right: Tensor, low: Tensor | None) -> None:
    """``W += left @ rightᵀ`` on this rank's range, computed in fp32. No communication.

    Args:
        weight: shard of W (rows, cols), float32, bfloat16 or float16.
        left: full factor (rows, r) float32.
        right: full factor (cols, r) float32.
        low: remainders for ``split``, int16, 1-D, as long as ``weight.local``; updated in place.
            None: a 16-bit weight is rounded to nearest. Not used for a float32 weight.
    """
    left, right = left.to(weight.local.device), right.to(weight.local.device)
    if weight.local.dtype == torch.float32:
        weight.add_low_rank_(left, right)
        return
    for piece in weight.pieces(max_rows=max(1, SCRATCH_ELEMENTS // weight.shape[1])):
        increment = left[piece.rows] @ right[piece.cols].T
        if low is None:
            piece.block.copy_(increment.add_(piece.block))
            continue
        low_block = low[piece.flat].view_as(piece.block)
        value = increment.add_(join_halves(piece.block, low_block))
        high, rest = split_halves(value, weight.local.dtype)
        piece.block.copy_(high)
        low_block.copy_(rest)


def zero_low_half(weight: FlatShard) -> Tensor:
    """Remainders of a weight before its first merge: int16 zeros, sharded like the weight."""
    return torch.zeros_like(weight.local, dtype=torch.int16)
