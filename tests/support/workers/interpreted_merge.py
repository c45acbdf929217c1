"""The merge kernel on a CPU, under Triton's interpreter. A process of its own prints what it finds.

Triton reads TRITON_INTERPRET when it is imported. So no test's own process can run this.
"""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.merge_kernel import merge_range_
from scalora_dist.core.split_precision import add_with_pytorch_, join_halves
from tests.support.workers import shards as work

CUT: Any = object()  # merges are local: the group is never used
KINDS = {
    "fp32": (torch.float32, False),
    "bf16 nearest": (torch.bfloat16, False),
    "fp16 nearest": (torch.float16, False),
    "bf16 split": (torch.bfloat16, True),
    "fp16 split": (torch.float16, True),
}
# (shape, range). Tiles have 128 rows and 64 columns.
RANGES = {
    "whole": ((130, 72), (0, 130 * 72)),
    "part rows at both ends": ((140, 67), (20, 9000)),
    "a part row at the beginning": ((140, 67), (20, 67 * 100)),
    "a part row at the end": ((140, 67), (67 * 3, 9000)),
    "aligned part rows": ((140, 80), (24, 9000)),
    "inside a row": ((9, 200), (230, 390)),
    "one element": ((9, 200), (399, 400)),
    "empty": ((9, 200), (230, 230)),
    "far down": ((5000, 16), (79_000, 79_990)),
}
RANKS = (8, 1, 3, 16)  # in turn: there are nine ranges


def merged(
    shape: tuple[int, int], span: tuple[int, int], kind: str, left: Tensor, right: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """(W, low half) after one merge by the kernel and by PyTorch, and W before in float64.

    W's storage begins and ends with elements that no merge may change.
    """
    dtype, split = KINDS[kind]
    generator = torch.Generator().manual_seed(sum(span))
    (whole,) = work.matrices([shape])
    storage = torch.nn.functional.pad(whole.to(dtype).flatten()[slice(*span)], (8, 8), value=7.0)
    lows = torch.randint(-(2**15), 2**15, storage.shape, generator=generator).to(torch.int16)
    found = []
    for use_kernel in (True, False):
        local, low = storage.clone()[8:-8], lows.clone()[8:-8]
        before = (join_halves(local, low) if split else local).double()
        remainder = low if split else None
        if use_kernel:
            merge_range_(local, remainder, left, right, span[0], shape[1])
        else:
            add_with_pytorch_(FlatShard(local, span[0], shape, CUT), left, right, remainder)
        edges = local.untyped_storage().nbytes() // local.itemsize
        padded = torch.empty(0, dtype=dtype).set_(local.untyped_storage())
        assert (padded[:8] == 7).all() and (padded[edges - 8 :] == 7).all()
        found.append((local, low))
    return found[0], found[1], before


def error(kind: str, shape: tuple[int, int], span: tuple[int, int], rank: int) -> float:
    """The largest error of a merge against float64, in units of what fp32 or W can hold."""
    dtype, split = KINDS[kind]
    left, right = work.matrices([(shape[0], rank), (shape[1], rank)], seed=1)
    (local, low), _, before = merged(shape, span, kind, left, right)
    after = (join_halves(local, low) if split else local).double()
    product = (left.double() @ right.double().T).flatten()[slice(*span)]
    # Each of rank + 1 sums rounds a number no larger than this.
    most = (left.abs().double() @ right.abs().double().T).flatten()[slice(*span)] + before.abs()
    unit = torch.finfo(torch.float32 if split else dtype).eps / 2
    if kind == "fp16 split":  # below 2⁻¹⁶ a pair is an fp32 number no more
        most = most + 2.0**-25 / unit
    allowed = (rank + 1) * torch.finfo(torch.float32).eps * most + unit * most
    return float(((after - before - product).abs() / allowed).max()) if len(local) else 0.0


def same(kind: str, shape: tuple[int, int], span: tuple[int, int], rank: int) -> bool:
    """Whether the kernel's bits are PyTorch's, with factors whose products and sums are exact."""
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randint(-3, 9, (n, rank), generator=generator) * 2.0**-10 for n in shape)
    ours, theirs, _ = merged(shape, span, kind, left, right)
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def every_number(kind: str, factor: float) -> dict[str, float]:
    """All 16-bit numbers (fp32: any bits), with any low half, plus ±``factor``: kernel and PyTorch.

    Ties, subnormals, zeros of both signs, the largest numbers, infinities and NaN are among them.
    Half of the low halves are those at which rounding changes.
    """
    dtype, split = KINDS[kind]
    generator = torch.Generator().manual_seed(1)
    shape = (256, 256)
    if dtype == torch.float32:
        bits = torch.randint(-(2**31), 2**31, (2**16,), generator=generator)
        special = [0, -(2**31), 1, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0x807FFFFF]
        bits[: len(special)] = torch.tensor(special)
        value = bits.to(torch.int32).view(dtype)
    else:
        value = torch.arange(2**16).to(torch.int16).view(dtype)
    lows = torch.randint(-(2**15), 2**15, (2**16,), generator=generator).to(torch.int16)
    corner = torch.tensor([-(2**15), 1 - 2**15, -1, 0, 1, 2**15 - 1], dtype=torch.int16)
    lows[::2] = corner[torch.randint(6, (2**15,), generator=generator)]
    lows[value.isnan()] = 0
    left, right = torch.ones(256, 1), torch.full((256, 1), factor)
    right[::3] *= -1
    pairs = []
    for use_kernel in (True, False):
        local, low = value.clone(), lows.clone()
        remainder = low if split else None
        if use_kernel:
            merge_range_(local, remainder, left, right, 0, 256)
        else:
            add_with_pytorch_(FlatShard(local, 0, shape), left, right, remainder)
        pairs.append((local, low))
    (ours, our_low), (theirs, their_low) = pairs
    number = ~theirs.isnan()
    words = torch.int32 if dtype == torch.float32 else torch.int16
    return {
        "numbers": int(number.sum()),
        "infinities": int(theirs.isinf().sum()),
        "other bits": int((ours.view(words) != theirs.view(words))[number].sum()),
        "other low bits": int((our_low != their_low)[number].sum()),
        "not NaN": int((~ours.isnan())[~number].sum()),
    }


def beyond_32_bits() -> bool:
    """Whether the kernel's bits are PyTorch's where the index of an element needs 64 bits."""
    shape, offset = (2**20, 4096), 2**31 + 777
    left, right = work.matrices([(shape[0], 1), (shape[1], 1)])
    ours, theirs = torch.zeros(9000), torch.zeros(9000)
    merge_range_(ours, None, left, right, offset, shape[1])
    add_with_pytorch_(FlatShard(theirs, offset, shape, CUT), left, right, None)
    return torch.equal(ours, theirs) and bool(ours.any())


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {"error": {}, "same": {}, "every number": {}}
    found["same"]["beyond 32 bits"] = beyond_32_bits()
    for (kind, (place, case)), rank in zip(
        itertools.product(KINDS, RANGES.items()), itertools.cycle(RANKS)
    ):
        found["error"][f"{kind}, {place}, r = {rank}"] = error(kind, *case, rank)
        found["same"][f"{kind}, {place}, r = {rank}"] = same(kind, *case, rank)
    for kind in KINDS:
        found["error"][f"{kind}, r = 256"] = error(kind, (7, 40), (3, 277), 256)
        # 2⁻¹³⁰ is subnormal in fp32 and bfloat16, 2⁻²⁵ in float16.
        for factor in (0.0, 2.0**-130, 2.0**-25, 1.0, 3.0e38):
            found["every number"][f"{kind} + {factor}"] = every_number(kind, factor)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
