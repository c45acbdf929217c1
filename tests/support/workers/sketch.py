"""Merges with a known sum, and functions that ranks run in tests/core/test_rank_sketch.py."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.rank_sketch import RankSketch, Spectrum
from scalora_dist.distributed.world import World
from tests.support.workers.shards import CUTS, Ranges, Shape, counted, matrices, shard_of

NAMES = ["tall", "wide"]
SHAPES = [(61, 40), (37, 59)]
RANK = 4
SCALINGS = [2.0, 0.5]
MERGES = 4
WIDTH = 24  # the update's rank is at most (MERGES + 1) · RANK = 20


def crumbs(shape: Shape, world: int) -> Ranges:
    """One element on each rank except the last. So several ranks own the first row."""
    edges = [*range(world), shape[0] * shape[1]]
    return list(itertools.pairwise(edges))


ALL_CUTS = CUTS | {"crumbs": crumbs}


def factors(moment: int) -> list[tuple[Tensor, Tensor]]:
    """A (m, r) and B (n, r) float32 of each layer at merge ``moment``; ``MERGES``: the current."""
    shapes = [(height, RANK) for shape in SHAPES for height in shape]
    wholes = matrices(shapes, seed=100 + moment)
    return list(zip(wholes[0::2], wholes[1::2], strict=True))


def weights(moment: int) -> Tensor:
    """Weights of a merge (layers, r) float64, of both signs, smaller with every merge."""
    (rows,) = matrices([(len(SHAPES), RANK)], seed=200 + moment)
    return rows.double() * 0.4**moment


def exact() -> list[Tensor]:
    """ΔW (m, n) float64 of each layer after all merges, with the current s·A Bᵀ."""
    updates = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for moment in range(MERGES + 1):
        rows = weights(moment)
        if moment == MERGES:
            rows = torch.tensor(SCALINGS, dtype=torch.float64)[:, None].expand(-1, RANK)
        for update, (a, b), row in zip(updates, factors(moment), rows, strict=True):
            update += (a.double() * row) @ b.double().T
    return updates


def my_factors(world: World, moment: int, cut: str | None) -> list[tuple[FlatShard, FlatShard]]:
    """This rank's shards of ``factors``; if ``cut`` is None, full and without a group."""

    def shard(whole: Tensor) -> FlatShard:
        rows, cols = whole.shape
        if cut is None:
            return FlatShard(whole.flatten(), 0, (rows, cols))
        return shard_of(
            whole, ALL_CUTS[cut]((rows, cols), world.size)[world.rank], dist.group.WORLD
        )

    return [(shard(a), shard(b)) for a, b in factors(moment)]


def monitor(world: World, cut: str | None) -> RankSketch:
    return RankSketch(NAMES, my_factors(world, 0, cut), world.device, width=WIDTH, seed=7)


def present(monitor: RankSketch, world: World, cut: str | None) -> list[Spectrum]:
    return monitor.read(my_factors(world, MERGES, cut), SCALINGS)


def watched(world: World, cut: str | None) -> dict[str, Any]:
    """All merges, then two readings. Returns spectra, sketches, and collectives of each part."""
    made = monitor(world, cut)
    adds = []
    for moment in range(MERGES):
        mine = my_factors(world, moment, cut)
        with counted() as calls:
            made.add(mine, weights(moment))
        adds.append(dict(calls))
        again = my_factors(world, moment, cut)
        for pair, before in zip(mine, again, strict=True):
            assert all(torch.equal(f.local, b.local) for f, b in zip(pair, before, strict=True))
    with counted() as calls:
        spectra = present(made, world, cut)
    assert present(made, world, cut) == spectra  # reading changes nothing
    return {
        "spectra": spectra,
        "sketches": {
            name: (shard.shape, shard.offset, shard.local) for name, shard in made.shards().items()
        },
        "adds": adds,
        "read": dict(calls),
    }


def save(world: World, folder: Path, cut: str | None) -> None:
    """Save a checkpoint of the sketches after half of the merges."""
    # Imported here because it takes seconds, and most ranks never save.
    from scalora_dist.checkpoint.parts import FlatPart
    from tests.support.workers.checkpoint import checkpoints

    made = monitor(world, cut)
    for moment in range(MERGES // 2):
        made.add(my_factors(world, moment, cut), weights(moment))
    parts = {name: FlatPart.share_of(shard, world) for name, shard in made.shards().items()}
    files = checkpoints(world, folder)
    files.save(1, parts, {}, {})
    assert files.outcome(wait=True) is None


def resume(world: World, folder: Path, cut: str | None) -> list[Spectrum]:
    """Load the checkpoint of ``save`` and do the other half. Returns the reading after it."""
    from scalora_dist.checkpoint.parts import FlatPart
    from tests.support.workers.checkpoint import checkpoints

    made = monitor(world, cut)
    parts = {name: FlatPart.of(shard) for name, shard in made.shards().items()}
    checkpoints(world, folder).load(folder / "checkpoint-1", parts)
    for moment in range(MERGES // 2, MERGES):
        made.add(my_factors(world, moment, cut), weights(moment))
    return present(made, world, cut)


def broken(world: World, cut: str) -> list[Spectrum]:
    """A reading of factors with one NaN, on one rank only."""
    made = monitor(world, cut)
    mine = my_factors(world, 0, cut)
    if world.rank == world.size - 1:
        mine[0][1].local[-1] = torch.nan
    return made.read(mine, SCALINGS)
