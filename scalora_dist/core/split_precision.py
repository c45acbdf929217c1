"""Adds a low-rank product to this rank's shard of a frozen weight, with fp32 precision.

An fp32 weight needs no special care. A 16-bit weight would round away an increment below half a
unit in the last place, although A and B did change. ``split`` keeps, beside each 16-bit weight, the
low 16 bits of the fp32 number that the weight stands for. ``nearest`` loses these bits.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from scalora_dist.core import host_pieces
from scalora_dist.core.flat_shard import FlatShard

logger = logging.getLogger(__name__)

# Number of elements of the fp32 buffers of a 16-bit merge. A CPU's cache holds these; without
# Triton a GPU takes larger ones, in fewer kernels.
SCRATCH_ELEMENTS = 2**17
GPU_SCRATCH_ELEMENTS = 2**24


def join_halves(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers that have the 16-bit roundings ``high`` and the remainders ``low``.

    Args:
        high: roundings, bfloat16 or float16, any shape.
        low: remainders, int16, same shape: the fp32 bits minus those of ``high`` cast to fp32.
    """
    return high.float().view(torch.int32).add_(low).view(torch.float32)


def split_halves(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Splits fp32 values into (high, low); the inverse of ``join_halves``.

    ``high`` is the number of ``dtype`` nearest to each value. The split is exact for every finite
    value in bfloat16. In float16 it is exact from 2⁻¹⁶ up to the largest number; below 2⁻¹⁶ the
    error is at most 2⁻²⁵, half of the smallest step. An infinity becomes NaN.
    """
    high = torch.empty_like(value, dtype=dtype)
    low = torch.empty_like(value, dtype=torch.int16)
    _split_into(value.clone(), high, low)
    return high, low


def _split_into(value: Tensor, high: Tensor, low: Tensor) -> None:
    """``split_halves`` into tensors that are there. Uses up ``value``."""
    bits = value.view(torch.int32)
    if high.dtype == torch.bfloat16:  # its bits are the upper 16: the lower ones, signed, remain
        low.copy_(bits)
    # Setting the lowest bit breaks ties away from zero, so the remainder fits a signed int16.
    high.copy_((bits | 1).view(torch.float32))
    if high.dtype != torch.bfloat16:
        low.copy_(bits.sub_(high.float().view(torch.int32)).clamp_(-(2**15), 2**15 - 1))


def add_low_rank_(
    weight: FlatShard, left: Tensor, right: Tensor, low: Tensor | None, *, wait: bool = True
) -> None:
    """``W += left @ rightᵀ`` on this rank's range, computed in fp32. No communication.

    On a GPU this is one Triton kernel, which reads and writes W once. A shard in the host's memory
    goes through the GPU of the factors in pieces. On a CPU, or without Triton, PyTorch does it.

    Args:
        weight: shard of W (rows, cols), float32, bfloat16 or float16; in PyTorch also float64,
            with float64 factors.
        left: full factor (rows, r) float32. The device of the factors computes, if it is a GPU.
        right: full factor (cols, r) float32, on the same device.
        low: remainders for ``split``, int16, 1-D, as long as ``weight.local`` and beside it;
            updated in place. None: a 16-bit weight is rounded to nearest. Not used for a float32
            weight.
        wait: whether the host waits until a shard in its own memory is complete. If not, call
            ``host_pieces.wait()`` before the host reads it, and before another merge into it.
    """
    if weight.local.dtype == torch.float32:
        low = None
    device = weight.local.device if weight.local.is_cuda else left.device
    in_kernel = device.type == "cuda" and weight.local.dtype != torch.float64
    merge = _kernel() if in_kernel else None
    if merge is None:
        add_with_pytorch_(weight, left, right, low)
        return
    left, right = left.to(device), right.to(device)
    range_of = (weight.local, low, left, right, weight.offset, weight.shape[1])
    if weight.local.is_cuda:
        merge(*range_of)
        return
    host_pieces.on(left.device).add_(*range_of, merge)
    if wait:
        host_pieces.wait()


def add_with_pytorch_(weight: FlatShard, left: Tensor, right: Tensor, low: Tensor | None) -> None:
    """``add_low_rank_`` in PyTorch's operations, for CPUs. The reference of the Triton kernel."""
    left, right = left.to(weight.local.device), right.to(weight.local.device)
    if weight.local.dtype == torch.float32:
        weight.add_low_rank_(left, right)
        return
    elements = GPU_SCRATCH_ELEMENTS if weight.local.is_cuda else SCRATCH_ELEMENTS
    for piece in weight.pieces(max_rows=max(1, elements // weight.shape[1])):
        increment = left[piece.rows] @ right[piece.cols].T
        if low is None:
            piece.block.copy_(increment.add_(piece.block))
            continue
        low_block = low[piece.flat].view_as(piece.block)
        value = increment.add_(join_halves(piece.block, low_block))
        _split_into(value, piece.block, low_block)


@cache
def _kernel() -> host_pieces.Merge | None:
    """The operator that is the Triton kernel; None: triton is not installed, or cannot compile."""
    if find_spec("triton") is None:
        return None
    from scalora_dist.core import merge_kernel

    if problem := merge_kernel.problem():
        logger.warning(
            "Triton cannot compile here (%s), so merges into W are slower: it needs a C compiler "
            "and Python's headers",
            problem,
        )
        return None
    return merge_kernel.merge_range_


def zero_low_half(weight: FlatShard) -> Tensor:
    """Remainders of a weight before its first merge: int16 zeros, sharded like the weight.

    In pinned memory, where the weight is: both are then copied to a GPU without the host's help.
    """
    local = weight.local
    return torch.zeros(
        local.shape, dtype=torch.int16, device=local.device, pin_memory=local.is_pinned()
    )
