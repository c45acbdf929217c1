"""Matrices with known singular values, and functions for tests/core/test_sharded_svd.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scalora_dist.core.sharded_svd import TruncatedSVD, truncated_svd
from scalora_dist.distributed.world import World
from tests.support.workers.shards import CUTS, Ranges, counted, shard_of

Shape = tuple[int, int]


def with_values(shape: Shape, values: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix with these singular values; the others are zero."""
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randn(size, len(values), generator=generator).double() for size in shape)
    left, right = (torch.linalg.qr(draw).Q for draw in draws)
    return (left * values) @ right.T


def signs(shape: Shape, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).sign()


@contextmanager
def message_sizes() -> Iterator[list[int]]:
    """Records the number of elements of every all-reduce inside ``with``."""
    sizes: list[int] = []
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield sizes
    finally:
        dist.all_reduce = original


def svd_of_ranges(world: World, whole: Tensor, rank: int, ranges: Ranges) -> TruncatedSVD:
    """The SVD of one matrix with the given ranges. Asserts that the shard is not changed."""
    shard = shard_of(whole, ranges[world.rank], dist.group.WORLD)
    before = shard.local.clone()
    svd = truncated_svd(shard, rank, device=world.device)
    assert torch.equal(shard.local, before)
    return svd


def svds(world: World, problems: list[tuple[Tensor, int]], kind: str) -> list[TruncatedSVD]:
    """The SVD of each (matrix, rank), sharded as ``kind``."""
    return [
        svd_of_ranges(world, whole, rank, CUTS[kind]((len(whole), whole.shape[1]), world.size))
        for whole, rank in problems
    ]


def messages(world: World, whole: Tensor, rank: int, kind: str) -> tuple[dict[str, int], list[int]]:
    """The calls of collectives in one SVD, and the elements of each all-reduce."""
    with counted() as calls, message_sizes() as sizes:
        svds(world, [(whole, rank)], kind)
    return dict(calls), sizes


def alone(world: World, whole: Tensor, rank: int) -> tuple[dict[str, int], TruncatedSVD]:
    """The calls of collectives in an SVD of a matrix without a group, and the SVD."""
    with counted() as calls:
        svd = truncated_svd(shard_of(whole, (0, whole.numel()), None), rank, device=world.device)
    return dict(calls), svd
