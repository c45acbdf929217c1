"""How an engine cuts a list of matrices: the flat range of each matrix on each rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from scalora_dist.core.arithmetic import ceil_div

Sharding: TypeAlias = Literal["local", "zero1", "zero3", "fsdp"]
SHARDINGS: tuple[Sharding, ...] = ("local", "zero1", "zero3", "fsdp")
ZERO_ALIGNMENT = 2  # DeepSpeed pads the flat buffer to this number of elements for each rank


def ranges_of(sharding: Sharding, shapes: Sequence[tuple[int, int]], size: int) -> Tensor:
    """The flat range of each matrix on each rank, (size, matrices, 2) int64 on the CPU.

    Args:
        sharding: "local": all on every rank; "zero1": pieces of one flat buffer over all matrices
            in order; "zero3": as many elements of each matrix on every rank; "fsdp": complete rows.
        shapes: (rows, cols) of the matrices.
        size: world size.
    """
    rows, cols = torch.tensor(shapes, dtype=torch.int64).T
    numel, rank = rows * cols, torch.arange(size)[:, None]
    if sharding == "local":
        low, high = torch.zeros(size, len(shapes), dtype=torch.int64), numel.expand(size, -1)
    elif sharding == "zero1":
        ends = numel.cumsum(0)
        share = ceil_div(int(ends[-1]), ZERO_ALIGNMENT * size) * ZERO_ALIGNMENT
        starts = ends - numel
        low = (rank * share - starts).clamp_min(0).minimum(numel)
        high = ((rank + 1) * share - starts).clamp_min(0).minimum(numel)
        held = low < high
        low, high = low * held, high * held  # DeepSpeed gives no place to what a rank has not
    else:
        unit = cols if sharding == "fsdp" else torch.ones_like(cols)
        share = -(-(numel // unit) // size) * unit
        low, high = (rank * share).minimum(numel), ((rank + 1) * share).minimum(numel)
    return torch.stack([low, high], dim=-1)
