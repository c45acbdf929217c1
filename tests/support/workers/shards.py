"""Ways to shard matrices, and functions that ranks run in tests/core."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from scalora_dist.core import layout as module
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.grams import GramSums, packed
from scalora_dist.core.layout import Layout, global_norm
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.methods.merger import IntoWeights, Merger
from scalora_dist.methods.scalora import Rescaler
from scalora_dist.profiling.clock import Clock

Shape = tuple[int, int]
Ranges = list[tuple[int, int]]  # flat range [lo, hi) of one matrix on each rank

COLLECTIVES = (
    "all_reduce",
    "all_gather_into_tensor",
    "all_gather",
    "all_gather_object",
    "reduce_scatter_tensor",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "scatter",
    "all_to_all",
    "all_to_all_single",
    "reduce",
    "barrier",
    "send",
    "recv",
)


def zero3(shape: Shape, world: int) -> Ranges:
    """ZeRO-3: ceil(numel / world) elements on each rank; the last ranks have fewer or none."""
    numel = math.prod(shape)
    share = -(-numel // world)
    return [(min(p * share, numel), min((p + 1) * share, numel)) for p in range(world)]


def fsdp2(shape: Shape, world: int) -> Ranges:
    """FSDP2's Shard(0): torch.chunk of the rows. Ranks without a chunk are empty."""
    lengths = [len(chunk) for chunk in torch.arange(shape[0]).chunk(world)]
    lengths += [0] * (world - len(lengths))
    ends = torch.tensor(lengths).cumsum(0).mul(shape[1]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def buffer(shape: Shape, world: int, seed: int = 0) -> Ranges:
    """ZeRO-1/2: a flattened buffer, cut anywhere. Rank 1 is empty, with an arbitrary offset."""
    numel = math.prod(shape)
    generator = torch.Generator().manual_seed(seed + 31 * numel + world)
    cuts = torch.randint(0, numel + 1, (world - 2,), generator=generator).sort().values.tolist()
    edges = [0, *cuts, numel]
    ranges = list(itertools.pairwise(edges))
    anywhere = int(torch.randint(0, numel + 1, (), generator=generator))
    return [ranges[0], (anywhere, anywhere), *ranges[1:]]


def backwards(shape: Shape, world: int) -> Ranges:
    """The last rank has the matrix's beginning. No engine does this: offsets decide, not ranks."""
    return zero3(shape, world)[::-1]


CUTS = {"zero3": zero3, "fsdp2": fsdp2, "buffer": buffer, "backwards": backwards}


def matrices(shapes: list[Shape], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def shard_of(whole: Tensor, span: tuple[int, int], group: Any) -> FlatShard:
    """A shard with a copy of the flat range ``span`` = [lo, hi) of ``whole``."""
    rows, cols = whole.shape
    return FlatShard(whole.flatten()[slice(*span)].clone(), span[0], (rows, cols), group)


def my_shards(world: World, wholes: list[Tensor], kind: str) -> list[FlatShard]:
    group = dist.group.WORLD
    return [
        shard_of(whole, CUTS[kind]((len(whole), whole.shape[1]), world.size)[world.rank], group)
        for whole in wholes
    ]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the calls of torch.distributed's collectives, and the all-gathered elements."""
    calls: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            if name == "all_gather_into_tensor":
                calls["gathered elements"] += args[0].numel()
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def grams(
    world: World, shapes: list[Shape], kind: str, room: int
) -> tuple[list[Tensor], dict[str, int]]:
    """The grams of [M, N] for every matrix, and the number of calls of each collective.

    Args:
        room: elements of a batch.
    """
    lists = [my_shards(world, matrices(shapes, seed), kind) for seed in (0, 1)]
    layout = Layout.of(lists[0])
    before = [shard.local.clone() for shards in lists for shard in shards]
    with counted() as calls, patch.object(module, "BATCH_ELEMENTS", room):
        answer = GramSums(layout)(packed(layout, lists, torch.float32), 2).sums
    after = [shard.local for shards in lists for shard in shards]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return list(answer), dict(calls)


def gram_of_ranges(world: World, shape: Shape, ranges: Ranges) -> tuple[Tensor, list[int]]:
    """The gram of one matrix with the given ranges, and the indices of its split rows."""
    (whole,) = matrices([shape])
    shard = shard_of(whole, ranges[world.rank], dist.group.WORLD)
    layout = Layout.of([shard])
    return gram_of(layout, shard), layout.split[0].tolist()


def gram_of(layout: Layout, shard: FlatShard) -> Tensor:
    return GramSums(layout)(packed(layout, [[shard]], torch.float32), 1).sums[0]


def mixed(world: World, shapes: list[Shape], kind: str, room: int) -> list[Tensor]:
    """[M, N] times a matrix of its own, for every M: gathered in full; ``room`` as above."""
    lists = [my_shards(world, matrices(shapes, seed), kind) for seed in (0, 1)]
    cols = shapes[0][1]
    mixes = torch.stack(matrices([(2 * cols, cols)] * len(shapes), 2)).double()
    layout = Layout.of(lists[0])
    sums, columns = GramSums(layout), packed(layout, lists, torch.float32)
    found = [shard.like(torch.full_like(shard.local, torch.nan)) for shard in lists[0]]
    with patch.object(module, "BATCH_ELEMENTS", room):
        for batch, values in sums.mixed(columns, sums(columns, 2), mixes):
            layout.unpack(batch, (values, found))
    return layout.gather(found, range(len(shapes)))


def gathered(
    world: World, shapes: list[Shape], kind: str, bucket_bytes: int, together: int
) -> tuple[list[Tensor], list[list[int]], dict[str, int]]:
    """All matrices gathered bucket by bucket, the buckets, and the calls of each collective.

    Args:
        bucket_bytes: limit in bytes of one bucket.
        together: number of consecutive matrices that stay in one bucket.
    """
    shards = my_shards(world, matrices(shapes), kind)
    layout = Layout.of(shards)
    usual = module.GATHER_BUCKET_BYTES
    module.GATHER_BUCKET_BYTES = bucket_bytes
    try:
        groups = [range(i, i + together) for i in range(0, len(shapes), together)]
        buckets = list(layout.buckets(groups))
    finally:
        module.GATHER_BUCKET_BYTES = usual
    with counted() as calls:
        wholes = [whole for bucket in buckets for whole in layout.gather(shards, bucket)]
    return wholes, buckets, dict(calls)


def stacks(world: World, shapes: list[Shape], kind: str) -> list[tuple[list[int], Tensor]]:
    """All matrices, gathered by shape."""
    shards = my_shards(world, matrices(shapes), kind)
    return Layout.of(shards).gather_stacks(shards, range(len(shapes)))


def norm(world: World, shapes: list[Shape], kind: str) -> float:
    return float(global_norm(my_shards(world, matrices(shapes), kind), world.device))


def rescale_collectives(world: World, layers: int) -> tuple[dict[str, int], dict[str, int]]:
    """The calls of collectives in a Rescaler's construction and in one call.

    Args:
        layers: number of layers, each 31 × 24.
    """
    m, n, r = 31, 24, 3

    def layer(i: int) -> LayerShards:
        shapes = [(m, n), (m, r), (n, r), (m, r), (n, r), *[(m, r)] * 2, *[(n, r)] * 2]
        W, A, B, grad_A, grad_B, *moments = my_shards(world, matrices(shapes, i), "zero3")
        sides = tuple(moments[:2]), tuple(moments[2:])
        return LayerShards(f"layer{i}", 2.0, W, A, B, grad_A, grad_B, *sides)

    built = [layer(i) for i in range(layers)]
    with counted() as first:
        merger = Merger(built, world, IntoWeights(built, "split"))
        rescaler = Rescaler(merger, rule="paper", eta_lipschitz=0.5, bounds=(0.05, 5.0))
    with counted() as each:
        assert rescaler(built, Clock()).applied
    return dict(first), dict(each)
