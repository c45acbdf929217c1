"""Merges into shards in the host's memory: pieces, slots, streams and events.

There is no GPU here. A stand-in for CUDA's streams runs their work late and in drawn orders.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from scalora_dist.core import host_pieces, split_precision
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.host_pieces import HostPieces, Place
from scalora_dist.core.split_precision import add_low_rank_, add_with_pytorch_, zero_low_half
from tests.support.lazy_streams import LazyCuda
from tests.support.workers import shards as work

CUT: Any = object()  # merges are local: the group is never used
CPU = torch.device("cpu")  # in the part of the GPU
# (shape, range, dtype, split). With slots of 512 bytes a piece has 128 or 256 elements.
MERGES = [
    ((31, 24), (17, 700), torch.bfloat16, True),
    ((31, 24), (0, 744), torch.float32, False),
    ((40, 33), (5, 1300), torch.bfloat16, False),
    ((9, 7), (3, 50), torch.float16, True),
    ((9, 7), (3, 3), torch.bfloat16, True),
    ((64, 48), (100, 3000), torch.float16, True),
]


@pytest.fixture(autouse=True)
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pieces, "SLOT_BYTES", 512)
    monkeypatch.setattr(host_pieces, "pinned", lambda size: torch.empty(size, dtype=torch.uint8))


def jobs() -> list[tuple[FlatShard, Tensor | None, Tensor, Tensor]]:
    """(shard, low half, left, right) of each merge. Factors whose products and sums are exact."""
    found = []
    for seed, (shape, span, dtype, split) in enumerate(MERGES):
        generator = torch.Generator().manual_seed(seed)
        (whole,) = work.matrices([shape], seed=seed)
        shard = work.shard_of(whole.to(dtype), span, CUT)
        low = torch.randint(-(2**15), 2**15, shard.local.shape, generator=generator)
        left, right = (torch.randint(-3, 9, (n, 3), generator=generator) * 2.0**-10 for n in shape)
        found.append((shard, low.to(torch.int16) if split else None, left, right))
    return found


def run_lazily(cuda: LazyCuda, monkeypatch: pytest.MonkeyPatch, *, pinned: bool) -> list[Any]:
    """All merges twice, the second round in another order. Returns the jobs, merged."""
    monkeypatch.setattr(host_pieces, "cuda", cuda)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: pinned)

    def merge(
        weight: Tensor, low: Tensor | None, left: Tensor, right: Tensor, offset: int, cols: int
    ) -> None:
        shard = FlatShard(weight, offset, (len(left), cols), CUT)
        cuda.put("merge", lambda: add_with_pytorch_(shard, left, right, low))

    merged = jobs()
    with cuda:
        pieces = HostPieces(CPU)
        for order in (merged, merged[::-1]):
            for shard, low, left, right in order:
                pieces.add_(shard.local, low, left, right, shard.offset, shard.shape[1], merge)
            pieces.wait()
    assert not pieces.slots
    return merged


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("prefer", ["", "up", "main", "down"])
def test_pieces_give_the_bits_of_the_whole_in_every_order(
    monkeypatch: pytest.MonkeyPatch, prefer: str, eager: bool, pinned: bool
) -> None:
    expected = jobs()
    for shard, low, left, right in [*expected, *expected]:
        add_with_pytorch_(shard, left, right, low)
    for seed in range(1 if prefer else 4):
        cuda = LazyCuda(seed, prefer, eager=eager)
        found = run_lazily(cuda, monkeypatch, pinned=pinned)
        assert not any(stream.queue for stream in cuda.streams[1:])  # the host waited for all
        for (shard, low, *_), (true, true_low, *_) in zip(found, expected, strict=True):
            assert torch.equal(shard.local, true.local)
            assert low is None or (true_low is not None and torch.equal(low, true_low))


@pytest.mark.parametrize("lost", ["up", "merged", "down"])
def test_every_event_is_needed(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """Without one of a slot's events some order gives other bits: the test above would see it."""
    expected = jobs()
    for shard, low, left, right in [*expected, *expected]:
        add_with_pytorch_(shard, left, right, low)

    class Careless(host_pieces.Slot):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            event = getattr(self, lost)
            # The host may wait for it, but streams do not.
            careless = SimpleNamespace(
                record=event.record, synchronize=event.synchronize, done=[True]
            )
            setattr(self, lost, careless)

    monkeypatch.setattr(host_pieces, "Slot", Careless)
    wrong = 0
    for prefer in ("", "up", "main", "down"):
        found = run_lazily(LazyCuda(0, prefer, eager=False), monkeypatch, pinned=True)
        wrong += any(
            not torch.equal(a.local, b.local)
            for (a, *_), (b, *_) in zip(found, expected, strict=True)
        )
    assert wrong


def test_copies_and_merges_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits only at the end; piece i + 1 goes up before piece i has come down."""
    monkeypatch.setattr(host_pieces, "cuda", cuda := LazyCuda(0, "up", eager=False))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    weight = torch.zeros(128 * 6)
    with cuda:
        pieces = HostPieces(CPU)
        pieces.add_(
            weight,
            None,
            torch.zeros(6, 1),
            torch.zeros(128, 1),
            0,
            128,
            lambda *_: cuda.put("merge", lambda: None),
        )
        assert not cuda.ran and cuda.host_waits == 0
        pieces.wait()
    order = [(stream, name) for stream, name in cuda.ran if name in ("copy", "merge")]
    first = order.index(("down", "copy"))
    assert order[:first].count(("up", "copy")) == host_pieces.SLOTS
    assert cuda.host_waits == 1
    assert order.count(("up", "copy")) == order.count(("down", "copy")) == 6


def test_a_slot_waits_for_what_had_its_memory_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's allocator gives freed memory away while the main stream has still to read it."""
    monkeypatch.setattr(host_pieces, "cuda", cuda := LazyCuda(0, "up", eager=False))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    before = [torch.full((512,), i, dtype=torch.uint8) for i in range(host_pieces.SLOTS)]
    freed = iter(before)

    class Reused(host_pieces.Slot):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.bytes = next(freed)

    monkeypatch.setattr(host_pieces, "Slot", Reused)
    read: list[Tensor] = []
    cuda.put("read", lambda: read.extend(x.clone() for x in before))
    with cuda:
        pieces = HostPieces(CPU)
        weight = torch.full((128 * 6,), 7.0)
        pieces.add_(weight, None, torch.zeros(6, 1), torch.zeros(128, 1), 0, 128, lambda *_: None)
        pieces.wait()
    assert [x.unique().tolist() for x in read] == [[0], [1], [2]]


def test_devices_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors, which know their device: factors on a GPU, W and low halves on the host."""
    queue = MagicMock()  # streams and events that only take calls
    streams = SimpleNamespace(
        Event=lambda: queue,
        Stream=lambda _: queue,
        current_stream=lambda _: queue,
        stream=lambda _: nullcontext(),
    )
    monkeypatch.setattr(host_pieces, "cuda", streams)
    monkeypatch.setattr(host_pieces, "_on_device", {})
    kernel = split_precision._kernel()
    assert kernel is not None
    merged = []

    def watched(weight: Tensor, low: Tensor | None, *others: Any) -> None:
        assert low is not None
        merged.append((weight.device.type, low.device.type, len(weight), others[2]))
        kernel(weight, low, *others)

    copies = []

    def copy_(target: Place, source: Place, *, non_blocking: bool) -> None:
        """Torch's CPU build has no copy between devices, not even of fake tensors."""
        for to, of in zip(target, source, strict=True):
            assert isinstance(to, Tensor) and isinstance(of, Tensor)
            assert (to.shape, to.dtype) == (of.shape, of.dtype)
            copies.append((of.device.type, to.device.type, non_blocking))

    monkeypatch.setattr(Place, "copy_", copy_)
    monkeypatch.setattr(split_precision, "_kernel", lambda: watched)
    with FakeTensorMode():
        local = torch.zeros(300, dtype=torch.bfloat16)
        shard = FlatShard(local, 17, (31, 24), CUT)
        low = zero_low_half(shard)
        left, right = torch.zeros(31, 3, device="cuda"), torch.zeros(24, 3, device="cuda")
        add_low_rank_(shard, left, right, low)
    assert low.device.type == "cpu"
    offsets = [17, 17 + 128, 17 + 256]
    assert merged == [
        ("cuda", "cuda", n, at) for n, at in zip((128, 128, 44), offsets, strict=True)
    ]
    # Of W and its low half: to staging, up and down; and from staging at the end.
    moves = [("cpu", "cpu", False), ("cpu", "cuda", True), ("cuda", "cpu", True)]
    assert copies == 3 * [move for move in moves for _ in range(2)] + 6 * [moves[0]]
