"""Predicts the host's memory that a save takes: copies of what this rank saves.

A save copies its parts (``RunState.parts``) to the host, in pinned memory on GPUs. A thread writes
them while the run trains. torch keeps the pinned memory for the next save.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from scalora_dist.distributed import random_state
from scalora_dist.planning.residency import Held, Residency, Weight

F32 = torch.float32.itemsize


class Part(NamedTuple):
    """A copy of a part of a tensor."""

    nbytes: float
    pinned: bool  # it comes from the device


def staged_parts(weights: Sequence[Weight], residency: Residency, held: Held) -> list[Part]:
    """The copies that a save makes: of trained weights those of the master and two moments.

    Args:
        weights: all parameters of the model.
        held: what the rank keeps, and where.
    """
    parts: list[Part] = []
    for weight in weights:
        if weight.saved:
            sizes = [F32] * 3 if weight.trained else [weight.stored, weight.low]
            away = ("moments" if weight.trained else "base") in held.host
            parts += [Part(size * residency.saved(weight), not away) for size in sizes if size]
    random = random_state.capture(torch.device("cpu"))
    return [*parts, *(Part(state.nbytes, False) for state in random.values())]


def host_bytes(parts: Sequence[Part]) -> float:
    """Bytes of the host's memory for parts: torch rounds pinned ones up to powers of two."""
    return sum(2.0 ** math.ceil(math.log2(x.nbytes)) if x.pinned else x.nbytes for x in parts)
