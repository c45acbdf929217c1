"""Adding a low-rank product into this rank's shard of a frozen weight, without losing it.

An fp32 weight takes the increment as it is. A 16-bit weight would round it away: an increment
below half a unit in the last place never arrives, while A and B did change. ``split`` keeps, beside
each 16-bit weight, the low 16 bits of the fp32 number it stands for; ``nearest`` loses them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from scalora_dist.core.flat_shard import FlatShard

MergeRounding = Literal["split", "nearest"]
# Elements of the fp32 scratch that a 16-bit merge works in.
SCRATCH_ELEMENTS = 2**24


def join_halves(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers whose 16-bit roundings are ``high`` and whose remainders are ``low``.

    Args:
        high: bfloat16 or float16, any shape.
        low: int16, same shape: the fp32 bit pattern less that of ``high`` widened to fp32.
    """
    return (high.float().view(torch.int32) + low).view(torch.float32)


def split_halves(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(high, low) with ``high`` the nearest ``dtype`` to each fp32 value; inverse of join_halves.

    bfloat16: exact for every finite value. float16: exact from 2⁻¹⁶ up to its largest number, and
    below 2⁻¹⁶ within 2⁻²⁵, half of its smallest step.
    """
    bits = value.view(torch.int32)
    # The lowest bit set breaks ties away from zero, so that the remainder fits 16 bits, signed.
    high = (bits | 1).view(torch.float32).to(dtype)
    low = bits - high.float().view(torch.int32)
    return high, low.clamp_(-(2**15), 2**15 - 1).to(torch.int16)


def add_low_rank_(weight: FlatShard, left: Tensor, right: Tensor, low: Tensor | None) -> None:
    """``W += left @ rightᵀ`` on this rank's range, in fp32; local, no message.

    Args:
        weight: shard of W (rows, cols), float32, bfloat16 or float16.
        left: (rows, r) float32, whole. right: (cols, r) float32, whole.
        low: int16, 1-D, like ``weight.local``: the remainders of ``split``, updated in place;
            None adds to fp32 as it is and to a 16-bit weight with round-to-nearest.
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
    """The remainders of a weight that nothing was merged into yet: int16 zeros, sharded like it."""
    return torch.zeros_like(weight.local, dtype=torch.int16)
