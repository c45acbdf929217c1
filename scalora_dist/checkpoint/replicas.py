"""Finds ranks whose copies of one tensor differ, before a checkpoint mixes slices of them.

Under ZeRO-0 to 2 every rank holds all of W and merges into it by itself. On a hybrid mesh every
replica does so with its shards. The copies stay the same bit for bit, unless a device, its driver
or its memory is faulty. No loss shows that: each rank only trains another model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from scalora_dist.checkpoint.manifest import checkpoint_folder, step_of
from scalora_dist.checkpoint.parts import holders
from scalora_dist.core.checksum import checksums
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.distributed.world import World
from scalora_dist.engines.base import Engine
from scalora_dist.errors import ReplicasDiffer

NAMED = 8  # number of ranks that a message names


def check_replicas(
    shards: dict[str, FlatShard],
    engine: Engine,
    step: int,
    newest_first: Callable[[], Sequence[Path]],
) -> None:
    """Check that all copies of a tensor, or of a shard of it, are the same bit for bit.

    One all-gather of one or two numbers per rank. Where no two ranks hold the same range (ZeRO-3,
    FSDP2 on a 1-D mesh, one process), nothing is computed and nothing is sent.

    Args:
        shards: {name: shard} of all tensors that training changes, in the same order on every rank.
        step: number of the step after which the run is to be saved.
        newest_first: finds the run's checkpoints, none of which is being written. A collective.

    Raises:
        ReplicasDiffer: on every rank, with the ranks whose copies differ and the last checkpoint.
    """
    world = engine.world
    copies = {x: s for x, s in (shards | forward_copies(engine)).items() if holders(s, world) > 1}
    if not copies:
        return
    sums = checksums([shard.local for shard in copies.values()])
    groups = torch.tensor([world.size // holders(shard, world) for shard in copies.values()])
    sizes = groups.unique().tolist()
    totals = checksums([sums[groups == size] for size in sizes])
    found = differing(_everyones(totals, world), sizes)
    if found is None:
        return
    table = _everyones(sums, world)
    names = [
        name
        for i, (name, size) in enumerate(zip(copies, groups.tolist(), strict=True))
        if differing(table[:, i : i + 1], [size])
    ]
    before = [x.name for x in newest_first() if (step_of(x) or 0) < step]
    advice = "there is no checkpoint from before, so start again on other nodes"
    if before:
        advice = f"go on from {before[0]} with --resume_from_checkpoint latest, on other nodes"
    refused = checkpoint_folder(Path(), step).name
    raise ReplicasDiffer(
        f"{describe_differing(found, names)}: {refused} is not written; a device or its driver may "
        f"be faulty: {advice}"
    )


def forward_copies(engine: Engine) -> dict[str, FlatShard]:
    """{name: what the forward reads} of the trained parameters, where every rank keeps it whole.

    ZeRO-1 and ZeRO-2 shard the masters, and ZeRO-0 copies them to 16 bits.
    """
    if not engine.keeps_whole_weights:
        return {}
    trained = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
    return {f"{name} of the forward": engine.shards.weight(p) for name, p in trained.items()}


class Differing(NamedTuple):
    """Ranks whose copies differ, and whether a majority tells that the other copies are good."""

    ranks: list[int]
    outvoted: bool


def differing(table: Tensor, sizes: Sequence[int]) -> Differing | None:
    """The ranks whose checksums differ from those of most ranks that hold the same range.

    If no value has a majority, all ranks that hold the range count. None: all copies are the same.

    Args:
        table: checksums of all ranks, (world, k) int64.
        sizes: number of ranks that hold one copy together, for each of the k columns. Ranks with
            the same place in their group hold the same range.
    """
    ranks: set[int] = set()
    outvoted = True
    for column, size in zip(table.T.tolist(), sizes, strict=True):
        for place in range(size):
            holding = range(place, len(column), size)
            value, votes = Counter(column[rank] for rank in holding).most_common(1)[0]
            if 2 * votes > len(holding):
                ranks |= {rank for rank in holding if column[rank] != value}
            else:
                ranks |= set(holding)
                outvoted = False
    return Differing(sorted(ranks), outvoted) if ranks else None


def _everyones(numbers: Tensor, world: World) -> Tensor:
    """The ``numbers`` (k,) of every rank, (world, k). One all-gather."""
    return world.gather_rows(numbers[None]).cpu()


def describe_differing(found: Differing, names: Sequence[str]) -> str:
    """Which ranks differ, and in which tensors."""
    ranks = [str(rank) for rank in found.ranks[:NAMED]]
    if more := len(found.ranks) - len(ranks):
        ranks.append(f"{more} more")
    who = " and ".join([", ".join(ranks[:-1]), ranks[-1]] if ranks[1:] else ranks)
    verb = f"ranks {who} hold" if ranks[1:] else f"rank {who} holds"
    what = names[0] + (f" and {len(names) - 1} more" if names[1:] else "")
    if found.outvoted:
        return f"{verb} other values of {what} than most ranks"
    return f"{verb} different values of {what}"
