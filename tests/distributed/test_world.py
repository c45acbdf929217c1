"""Waiting for rank 0, disks that nodes share or not, and the small sums, on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scalora_dist.distributed.world import places_on_nodes
from tests.support.ranks import Ranks
from tests.support.workers import world as world_work


@pytest.mark.parametrize("size", [1, 3])
def test_rank_0_fills_the_cache_and_the_others_read_it(
    ranks: Any, tmp_path: Path, size: int
) -> None:
    answers = ranks(size).run(world_work.cached, tmp_path, ranks_of_each=size, disks=1)
    assert answers == [(rank > 0, "made by rank 0") for rank in range(size)]


def test_one_rank_of_each_node_fills_its_cache(ranks: Any, tmp_path: Path) -> None:
    """Two nodes, the second one of a single rank."""
    answers = ranks(3).run(world_work.cached, tmp_path, ranks_of_each=2, disks=2)
    makers = [(False, 0), (True, 0), (False, 2)]
    assert answers == [(there, f"made by rank {rank}") for there, rank in makers]


def test_nodes_that_share_a_disk_fill_one_cache_once(ranks: Any, tmp_path: Path) -> None:
    answers = ranks(3).run(world_work.cached, tmp_path, ranks_of_each=1, disks=1)
    assert answers == [(rank > 0, "made by rank 0") for rank in range(3)]


@pytest.mark.parametrize(
    ("ranks_of_each", "wrong", "says"),
    [
        (3, {0, 1, 2}, "seen by rank 0"),
        (1, {1}, "rank 1: seen by rank 1"),
        (2, {2}, "rank 2: seen by rank 2"),
    ],
)
def test_all_ranks_hear_of_a_first_ranks_mistake(
    ranks: Any, ranks_of_each: int, wrong: set[int], says: str
) -> None:
    heard = ranks(3).run(world_work.refusal, ranks_of_each, wrong)
    own = [says.rpartition(": ")[2] if rank in wrong else says for rank in range(3)]
    assert heard == (own if ranks_of_each < 3 else [says] * 3)


def test_nodes_must_share_output_dir(ranks: Any, tmp_path: Path) -> None:
    own = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for said in ranks(3).run(world_work.output_dirs, own, save_steps=500):
        assert "is not shared: 2 node(s)" in said and "--save_steps 0" in said
    assert ranks(3).run(world_work.output_dirs, own, save_steps=0) == ["nothing"] * 3
    assert list(own[0].iterdir()) == [] and not own[1].exists()
    shared = [tmp_path / "shared"] * 3
    assert ranks(3).run(world_work.output_dirs, shared, save_steps=500) == ["nothing"] * 3
    assert list(shared[0].iterdir()) == []


def test_where_nothing_can_be_written(ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = ranks(3).run(world_work.output_dirs, [tmp_path / "file" / "run"] * 3, save_steps=500)
    assert len(set(said)) == 1 and "Not a directory" in said[0]


def test_reductions(ranks: Any) -> None:
    assert ranks(3).run(world_work.reductions) == [[3.0, 3.0, 2.0, 0.0]] * 3


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_table_that_the_ranks_share(ranks: Any, count: int) -> None:
    """One collective, bit for bit alike; an all-gather if it is less than half padding."""
    found = ranks(3).run(world_work.tables, count)
    name = "allreduce" if count == 1 else "allgather_base"
    for table, collectives in found:
        assert table.shape == (count, 2) and torch.equal(table, found[0][0])
        assert collectives == {name: 1}


def test_tensors_are_summed_without_being_read(ranks: Any) -> None:
    for found, reads, waits in ranks(3).run(world_work.mixed_reduction):
        assert found == [3.0, 1.5, 1.0, 3.0, 0.75]
        assert reads == [] and waits == 1


def test_a_rank_connects_to_few_others() -> None:
    """A collective takes a ring or a tree, not all pairs. The store is one more connection."""
    size = 8
    group = Ranks(size)
    try:
        counted = group.run(world_work.connections)
    finally:
        group.close()
    for rank, (before, after) in enumerate(counted):
        served = size * (rank == 0)
        assert before <= after <= size - 2 + 1 + served


@pytest.mark.parametrize(
    ("local_ranks", "places"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        ([0, 1, 0, 1], [0, 1, 0, 1]),
        ([0, 1, 2, 0], [0, 1, 2, 0]),  # nodes of unequal size
        ([0, 0, 0], [0, 0, 0]),
        ([1], [0]),  # a process that a launcher of something else has started
        ([1, 1], [0, 0]),
        ([0, 0, 1, 1], [0, 0, 1, 0]),  # in turns over two nodes: the last one counts for itself
    ],
)
def test_places_on_nodes(local_ranks: list[int], places: list[int]) -> None:
    assert places_on_nodes(local_ranks) == places
