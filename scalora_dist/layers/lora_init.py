"""Initial values of A and B. They depend only on the seed and the layer's name."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def lora_init(
    name: str, out_features: int, in_features: int, rank: int, *, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """LoRA's start: A (m, r) = 0, B (n, r) Kaiming-uniform with a = √5, that is U(±1/√n).

    B is drawn on the CPU from its own generator. So ranks, ZeRO stages, devices and other layers do
    not change it.
    """
    generator = generator_of(name, seed)
    bound = in_features**-0.5
    b = torch.empty(in_features, rank).uniform_(-bound, bound, generator=generator)
    return torch.zeros(out_features, rank, dtype=dtype), b.to(dtype)


def generator_of(name: str, seed: int) -> torch.Generator:
    """A CPU generator for one layer, seeded from its name and the run's seed."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
