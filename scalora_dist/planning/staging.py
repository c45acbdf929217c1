"""Predicts the host's memory that a save takes: copies of what this rank saves.

A save copies its parts (``RunState.parts``) to the host, in pinned memory on GPUs. A thread writes
them while the run trains. torch keeps the pinned memory for the next save.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from scalora_dist.distributed import random_state
from scalora_dist.planning.residency import Residency, Weight

F32 = torch.float32.itemsize


def staged_parts(weights: Sequence[Weight], residency: Residency) -> list[float]:
    """Bytes of each part that a rank saves: of trained weights the master and two moments.

    Args:
        weights: all parameters of the model.
    """
    parts: list[float] = []
    for weight in weights:
        if weight.saved:
            sizes = [F32] * 3 if weight.trained else [weight.stored, weight.low]
            parts += [size * residency.saved(weight) for size in sizes if size]
    random = random_state.capture(torch.device("cpu"))
    return [*parts, *(state.nbytes for state in random.values())]


def pinned(parts: Sequence[float]) -> float:
    """Bytes of pinned memory for parts: torch rounds each up to a power of two."""
    return float(sum(2 ** math.ceil(math.log2(size)) for size in parts if size))
