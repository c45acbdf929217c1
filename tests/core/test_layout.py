"""Layout: many matrices, cut up in each way, packed, scaled and gathered together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scalora_dist.core import layout as module
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.layout import Layout, full_tensor, global_norm, split_rows
from tests.core.test_flat_shard import CASES, CUT, SHAPES, Ranges
from tests.support.ranks import Ranks
from tests.support.workers import shards as work

StartRanks = Callable[[int], Ranks]
WORLDS = [2, 3, 4]
KINDS = list(work.CUTS)
CPU = torch.device("cpu")


def layout_of(shapes: list[tuple[int, int]], kind: str, world: int, rank: int) -> Layout:
    """The layout that a rank has. It cannot communicate."""
    spans = [work.CUTS[kind](shape, world) for shape in shapes]
    return Layout(shapes, np.array(spans).swapaxes(0, 1), CUT, CPU, rank)


def shards_of(layout: Layout, wholes: list[Tensor]) -> list[FlatShard]:
    """The layout's rank's shards of matrices."""
    spans = layout.ranges[layout.rank].tolist()
    return [work.shard_of(whole, span, CUT) for whole, span in zip(wholes, spans, strict=True)]


@pytest.mark.parametrize(("shape", "ranges"), CASES)
def test_split_rows_by_counting_owners(shape: tuple[int, int], ranges: Ranges) -> None:
    owner = torch.full((math.prod(shape),), -1)
    for rank, (low, high) in enumerate(ranges):
        owner[low:high] = rank
    assert (owner >= 0).all()
    expected = [i for i, row in enumerate(owner.view(shape).tolist()) if len(set(row)) > 1]
    assert split_rows(np.array(ranges), shape[1]).tolist() == expected


@pytest.mark.parametrize("room", [2**24, 100, 1])
@pytest.mark.parametrize(("kind", "world"), list(itertools.product(KINDS, WORLDS)))
def test_batches_hold_every_range_once(
    kind: str, world: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_ELEMENTS", room)
    for rank in range(world):
        layout = layout_of(SHAPES, kind, world, rank)
        spans = layout.ranges[rank].tolist()
        for batch in layout.batches:
            position = 0
            for group in batch:
                assert group.index.tolist() == group.which
                assert group.start == position
                position = group.flat.stop
                for i in group.which:
                    (low, high), cols = spans[i], SHAPES[i][1]
                    assert (group.cols, group.head, group.length) == (cols, low % cols, high - low)
                    assert group.rows == (high - 1) // cols - low // cols + 1
                    assert (high + group.tail) % cols == 0
            assert position <= room or (len(batch) == 1 and len(batch[0].which) == 1)
        held = [i for batch in layout.batches for group in batch for i in group.which]
        assert sorted(held) == [i for i, (low, high) in enumerate(spans) if high > low]


@pytest.mark.parametrize("room", [2**24, 30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "world"), list(itertools.product(KINDS, WORLDS)))
def test_scale_columns(
    kind: str, world: int, dtype: torch.dtype, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_ELEMENTS", room)
    shapes = [(31, 3), (24, 3), (1, 3), (31, 3), (5, 3)]
    lists = [[x.to(dtype) for x in work.matrices(shapes, seed)] for seed in range(3)]
    # 16-bit columns are scaled in fp32 and rounded once, all others in their own dtype.
    working = torch.promote_types(dtype, torch.float32)
    tables = torch.linspace(-3, 1.7, 2 * 5 * 3).view(2, 5, 3).to(working)
    for rank in range(world):
        layout = layout_of(shapes, kind, world, rank)
        shards = [shards_of(layout, wholes) for wholes in lists]
        layout.scale_columns_(tables, [[shards[0]], [shards[1], shards[2]]])
        for scaled, wholes, table in zip(shards, lists, tables[[0, 1, 1]], strict=True):
            for i, (shard, whole) in enumerate(zip(scaled, wholes, strict=True)):
                expected = shard.own((whole.to(working) * table[i]).to(dtype))
                assert torch.equal(shard.local, expected)


@pytest.mark.parametrize("room", [2**24, 100])
@pytest.mark.parametrize(("kind", "world"), list(itertools.product(KINDS, WORLDS)))
def test_unpack_is_the_inverse_of_pack(
    kind: str, world: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_ELEMENTS", room)
    for rank in range(world):
        layout = layout_of(SHAPES, kind, world, rank)
        shards = shards_of(layout, work.matrices(SHAPES))
        copies = [shard.like(torch.full_like(shard.local, torch.nan)) for shard in shards]
        for batch in layout.batches:
            layout.unpack(batch, (layout.pack(batch, shards), copies))
        for shard, copy in zip(shards, copies, strict=True):
            assert torch.equal(shard.local, copy.local)


def test_one_process_needs_no_group() -> None:
    shapes = [(31, 24), (13, 11)]
    wholes = work.matrices(shapes)
    shards = [FlatShard(w.flatten(), 0, shape) for w, shape in zip(wholes, shapes, strict=True)]
    layout = Layout.of(shards)
    for whole, gathered in zip(wholes, layout.gather(shards, range(2)), strict=True):
        assert torch.equal(whole, gathered)
    ((indices, stack),) = layout.gather_stacks([shards[0]], range(1))
    assert indices == [0] and torch.equal(stack[0], wholes[0])
    assert stack.data_ptr() != shards[0].local.data_ptr()
    assert full_tensor(shards[0]).data_ptr() == shards[0].local.data_ptr()
    expected = torch.cat([whole.double().flatten() for whole in wholes]).norm()
    assert float(global_norm(shards, CPU)) == pytest.approx(float(expected), rel=1e-14)


def test_one_layout_has_one_group() -> None:
    whole, part = FlatShard(torch.zeros(12), 0, (3, 4)), FlatShard(torch.zeros(5), 0, (3, 4), CUT)
    with pytest.raises(ValueError, match="one process group"):
        Layout.of([whole, part])


# --- real ranks ----------------------------------------------------------------------------------


def same_on_all(answers: list[list[Tensor]]) -> list[Tensor]:
    """Rank 0's tensors, if every rank's are the same bit for bit."""
    for other in answers[1:]:
        for ours, theirs in zip(answers[0], other, strict=True):
            assert torch.equal(ours, theirs)
    return answers[0]


def test_shares_are_those_of_even_cuts() -> None:
    shapes = [(31, 3), (24, 3), (2, 3)]
    assert layout_of(shapes, "zero3", 4, 0).shares == [24, 18, 2]
    # The 2 rows are on two of the 4 ranks: an all-gather would be half padding.
    assert layout_of(shapes, "fsdp2", 4, 0).shares == [24, 18, 0]
    assert layout_of(shapes, "buffer", 4, 0).shares == [0, 0, 0]


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("bucket_bytes", [2**30, 4 * 200, 1])
@pytest.mark.parametrize(("world", "kind"), list(itertools.product(WORLDS, KINDS)))
def test_gather_in_buckets(
    ranks: StartRanks, world: int, kind: str, bucket_bytes: int, together: int
) -> None:
    answers = ranks(world).run(work.gathered, SHAPES, kind, bucket_bytes, together)
    for whole, expected in zip(
        same_on_all([wholes for wholes, _, _ in answers]), work.matrices(SHAPES), strict=True
    ):
        assert torch.equal(whole, expected)
    sizes = [4 * math.prod(shape) for shape in SHAPES]
    shares = layout_of(SHAPES, kind, world, 0).shares
    for _, buckets, calls in answers:
        assert [i for bucket in buckets for i in bucket] == list(range(len(SHAPES)))
        assert all(len(bucket) % together == 0 for bucket in buckets)
        for bucket in buckets:  # over the limit only where nothing could be left out
            assert len(bucket) == together or sum(sizes[i] for i in bucket) <= bucket_bytes
        even = [{bool(shares[i]) for i in bucket} for bucket in buckets]
        assert calls.get("all_gather_into_tensor", 0) == sum(True in kinds for kinds in even)
        assert calls.get("all_reduce", 0) == sum(False in kinds for kinds in even)
        assert set(calls) <= {"all_gather_into_tensor", "all_reduce", "gathered elements"}
        if bucket_bytes == 2**30:
            assert len(buckets) == 1
        if bucket_bytes == 1:
            assert len(buckets) == len(SHAPES) // together


@pytest.mark.parametrize(("world", "kind"), list(itertools.product(WORLDS, KINDS)))
def test_matrices_of_one_shape_are_gathered_in_one_tensor(
    ranks: StartRanks, world: int, kind: str
) -> None:
    shapes = [(31, 3), (24, 3), (31, 3), (1, 3), (31, 3), (24, 3)]
    for answer in ranks(world).run(work.stacks, shapes, kind):
        assert sorted(i for indices, _ in answer for i in indices) == list(range(len(shapes)))
        if kind != "buffer":  # there, matrices of one shape may be cut in two ways
            assert [indices for indices, _ in answer] == [[0, 2, 4], [1, 5], [3]]
        for indices, stack in answer:
            for i, whole in zip(indices, stack, strict=True):
                assert torch.equal(whole, work.matrices(shapes)[i])
                assert whole.is_contiguous()


@pytest.mark.parametrize(("world", "kind"), list(itertools.product(WORLDS, KINDS)))
def test_global_norm(ranks: StartRanks, world: int, kind: str) -> None:
    norms = ranks(world).run(work.norm, SHAPES, kind)
    expected = torch.cat([w.double().flatten() for w in work.matrices(SHAPES)]).norm()
    assert norms[0] == pytest.approx(float(expected), rel=1e-14)
    assert norms == norms[:1] * world


@pytest.mark.parametrize("world", WORLDS)
def test_rescales_collectives_do_not_depend_on_the_number_of_layers(
    ranks: StartRanks, world: int
) -> None:
    few = ranks(world).run(work.rescale_collectives, 2)
    many = ranks(world).run(work.rescale_collectives, 12)
    for (first_few, each_few), (first_many, each_many) in zip(few, many, strict=True):
        gathered = each_many.pop("gathered elements")
        assert gathered < 12 * 31 * 24  # A, B, α and β; never a W
        del each_few["gathered elements"]
        # Grams; then one gather of the scales and one bucket of factors. Before them one exchange
        # of split rows, which these factors do not have on 4 ranks.
        calls: dict[str, Any] = {"all_reduce": 1, "all_gather_into_tensor": 2}
        exchange = {} if world == 4 else {"all_to_all_single": 1}
        assert each_few == each_many == calls | exchange
        assert first_few["all_gather_into_tensor"] == first_many["all_gather_into_tensor"] == 1
        assert set(first_many) == {"all_gather_into_tensor", "gathered elements"}
