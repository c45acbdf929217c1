"""The merge of one weight in one Triton kernel: W and its low half are read and written once.

The kernel takes the arithmetic of ``split_precision.py``: the same bits, wherever sums of r
products in fp32 do not depend on their order. A program owns a tile of ``ROWS`` × ``COLS`` elements
of the matrix and masks those that lie outside this rank's range. So part rows need no launch of
their own. Importing this module needs triton.
"""

from __future__ import annotations

from subprocess import SubprocessError

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 128
COLS = 64
# Of a thread. A multiprocessor then has room for two programs of 8 warps: while one waits for its
# bytes, the other computes. Loops over larger ranks need more, so 16 warps share their tile.
REGISTERS = 128


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["first_row", "start", "rows", "cols", "numel"]
)
def _add_low_rank(  # type: ignore[no-untyped-def]
    weight,  # this rank's range of W (numel,), float32, bfloat16 or float16
    low,  # int16 (numel,); unused unless SPLIT
    left,  # (all rows, R) float32, contiguous
    right,  # (cols, R) float32, contiguous
    first_row,  # the first row that the range touches
    start,  # how many elements of that row lie before the range
    rows,  # number of touched rows
    cols,
    numel,
    R: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr,  # start, cols and numel are multiples of 8
    PAIRS: tl.constexpr,  # R is even, and both factors begin at a multiple of 8 bytes
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    if ALIGNED:  # the compiler then loads and stores 8 elements at once
        cols = cols // 8 * 8
        start = start // 8 * 8
    across = tl.cdiv(cols, COLS)
    row_0 = tl.program_id(0) // across * ROWS
    col_0 = tl.program_id(0) % across * COLS
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    # Only what is the same for a tile needs 64 bits.
    base = row_0.to(tl.int64) * cols + (col_0 - start)
    at = row[:, None] * cols + col[None, :]
    first = tl.maximum(-base, 0).to(tl.int32)
    end = tl.minimum(numel - base, 2147483647).to(tl.int32)
    row_inside, col_inside = row_0 + row < rows, col_0 + col < cols
    inside = (at >= first) & (at < end) & col_inside[None, :]
    if ALIGNED:
        inside = tl.max_constancy(inside, (1, 8))
    w = tl.load(weight + base + at, mask=inside, other=0.0)
    if SPLIT:
        rest = tl.load(low + base + at, mask=inside, other=0)

    left += (first_row + row_0).to(tl.int64) * R
    right += col_0.to(tl.int64) * R
    # Sums begin at -0.0, which keeps the sign of a product that is zero. tl.full would drop it.
    total = tl.full((ROWS, COLS), -(2**31), tl.int32).to(tl.float32, bitcast=True)
    if PAIRS:  # two numbers a load: neighbours of a column are R numbers apart
        left = left.to(tl.pointer_type(tl.int64), bitcast=True)
        right = right.to(tl.pointer_type(tl.int64), bitcast=True)
        for k in tl.range(R // 2, loop_unroll_factor=4):
            a = tl.load(left + row * (R // 2) + k, mask=row_inside, other=0)
            b = tl.load(right + col * (R // 2) + k, mask=col_inside, other=0)
            a_even = a.to(tl.int32).to(tl.float32, bitcast=True)
            b_even = b.to(tl.int32).to(tl.float32, bitcast=True)
            total = tl.fma(a_even[:, None], b_even[None, :], total)
            a_odd = (a >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            b_odd = (b >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            total = tl.fma(a_odd[:, None], b_odd[None, :], total)
    else:
        for k in tl.range(R):
            a = tl.load(left + row * R + k, mask=row_inside, other=0.0)
            b = tl.load(right + col * R + k, mask=col_inside, other=0.0)
            total = tl.fma(a[:, None], b[None, :], total)

    if weight.dtype.element_ty == tl.float32:
        tl.store(weight + base + at, w + total, mask=inside)
    else:
        # bfloat16 is rounded here, on bits: the same on every device, and in Triton's interpreter.
        is_bfloat16: tl.constexpr = weight.dtype.element_ty == tl.bfloat16
        if is_bfloat16:
            bits = w.to(tl.int16, bitcast=True).to(tl.int32) << 16
        else:
            bits = w.to(tl.float32).to(tl.int32, bitcast=True)
        if SPLIT:
            bits += rest.to(tl.int32)
        value = bits.to(tl.float32, bitcast=True) + total
        bits = value.to(tl.int32, bitcast=True)
        if is_bfloat16:
            # Half of the last place, less 1 where a tie goes to an even number below.
            half = 0x8000 if SPLIT else 0x7FFF + ((bits >> 16) & 1)
            is_number = (bits & 0x7FFFFFFF) <= (0x7F7FFFFF if SPLIT else 0x7F800000)
            high = tl.where(is_number, (bits + half) >> 16, 0x7FC0).to(tl.int16)
            if SPLIT:
                tl.store(low + base + at, bits.to(tl.int16), mask=inside)
            tl.store(weight + base + at, high.to(tl.bfloat16, bitcast=True), mask=inside)
        else:
            if SPLIT:
                value = (bits | 1).to(tl.float32, bitcast=True)  # a tie goes away from zero
            high = value.to(tl.float16)
            if SPLIT:
                lost = bits - high.to(tl.float32).to(tl.int32, bitcast=True)
                lost = tl.minimum(tl.maximum(lost, -32768), 32767)
                tl.store(low + base + at, lost.to(tl.int16), mask=inside)
            tl.store(weight + base + at, high, mask=inside)


def _launch(
    weight: Tensor, low: Tensor | None, left: Tensor, right: Tensor, offset: int, cols: int
) -> None:
    """``W += left @ rightᵀ`` on a flat range of W, in one kernel.

    Args:
        weight: the range, 1-D, float32, bfloat16 or float16.
        low: remainders for ``split``, int16, as long as ``weight``. None: a 16-bit weight is
            rounded to nearest. A float32 weight has none.
        left: full factor (rows, r) float32.
        right: full factor (cols, r) float32.
        offset: flat index of ``weight[0]`` in W.
        cols: number of columns of W.
    """
    if not (numel := weight.numel()):
        return
    left, right = left.contiguous(), right.contiguous()
    assert left.dtype == right.dtype == torch.float32  # the kernel reads their bits
    first_row, start = divmod(offset, cols)
    rows = -(-(start + numel) // cols)
    rank = right.shape[1]
    _add_low_rank[(programs(rows, cols),)](
        weight,
        weight if low is None else low,
        left,
        right,
        first_row,
        start,
        rows,
        cols,
        numel,
        R=rank,
        SPLIT=low is not None,
        ALIGNED=(cols | start | numel) % 8 == 0,
        PAIRS=(rank % 2 or left.data_ptr() % 8 or right.data_ptr() % 8) == 0,
        ROWS=ROWS,
        COLS=COLS,
        num_warps=8 if rank <= 8 else 16,
        maxnreg=REGISTERS,
    )


# An operator, so that fake tensors and counts of kernels know it. torch.library.custom_op would
# define it in fewer lines, but adds 17 µs to a call, and this 2 µs.
_library = torch.library.Library("scalora", "FRAGMENT")
_library.define(
    "add_low_rank_(Tensor(a!) weight, Tensor(b!)? low, Tensor left, Tensor right,"
    " int offset, int cols) -> ()"
)
_library.impl("add_low_rank_", _launch, "CompositeExplicitAutograd")
torch.library.register_fake("scalora::add_low_rank_", lambda *_: None, lib=_library)
merge_range_ = torch.ops.scalora.add_low_rank_.default


def problem() -> str | None:
    """Why Triton cannot compile here; None: it can. Its driver's first use compiles C code."""
    try:
        triton.runtime.driver.active.get_current_device()
    except (RuntimeError, OSError, SubprocessError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def programs(rows: int, cols: int) -> int:
    """Number of programs for a range that touches ``rows`` rows of a matrix with ``cols``."""
    return -(-rows // ROWS) * -(-cols // COLS)


def bytes_moved(offset: int, numel: int, cols: int, rank: int, least: int) -> int:
    """Bytes that the kernel reads and writes, if no program finds another's bytes in a cache.

    Args:
        offset: flat index of the range's first element.
        numel: length of the range.
        cols: number of columns of W.
        rank: columns of a factor.
        least: bytes of an element of W and its low half, read and written: 8 in ``split``.
    """
    rows = -(-(offset % cols + numel) // cols) if numel else 0
    left = -(-cols // COLS) * rows  # rows of left, each read by every program across
    right = -(-rows // ROWS) * cols
    return least * numel + 4 * rank * (left + right)
