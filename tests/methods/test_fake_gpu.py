"""Methods walked through on a fake GPU: devices, collectives, and how often the host waits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from scalora_dist.core import host, host_pieces
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.planning.launches import BESIDE_MERGES
from scalora_dist.planning.ranges import SHARDINGS, Sharding, ranges_of
from scalora_dist.profiling.clock import Clock
from scalora_dist.profiling.kernels import Counts, KernelCount
from tests.support.fake_gpu import RULES, SHAPES, WALKS, walk
from tools.fake_gpu.device import CUDA, fake_gpu
from tools.fake_gpu.layers import fake_layers

# Times that the host waits in one run of each method, for any number of layers.
WAITS = {
    **{f"rescale, {rule}": 2 for rule in RULES},
    "rescale, paper, fp16": 3,
    "rescale, paper, monitored": 2,
    "lora-pro": 2,
    "relora": 0,
    "carry": 0,
    "carry, full": 2,
}
# Largest number of kernels of one run of each method: (in all, and more for each layer).
KERNELS = {
    **{f"rescale, {rule}": (66, 3) for rule in RULES},
    "rescale, adamw": (102, 3),
    "rescale, paper, fp16": (90, 3),
    "rescale, paper, monitored": (130, 3),  # some layers are watched, of any number
    "lora-pro": (60, 2),
    "relora": (42, 10),
    "carry": (24, 32),
    "carry, full": (88, 32),
}


def check(method: str, counts: Counts, blocks: int) -> None:
    assert counts.waits == WAITS[method], counts.synchronisations
    fixed, each = KERNELS[method]
    assert counts.total <= fixed + each * blocks * len(SHAPES), counts.kernels


@pytest.mark.parametrize("method", WAITS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_methods_walk(method: str, sharding: Sharding) -> None:
    rank, size = (0, 1) if sharding == "local" else (3, 8)
    counts = walk(method, sharding, rank, size, blocks=1)
    check(method, counts, blocks=1)
    if method != "lora-pro":  # a plan takes no more launches than these
        assert counts.total >= len(SHAPES) + BESIDE_MERGES


@pytest.mark.parametrize(("rank", "size"), [(0, 8), (7, 8), (9, 16)])
@pytest.mark.parametrize("sharding", SHARDINGS[1:])
def test_other_ranks_walk(sharding: Sharding, rank: int, size: int) -> None:
    check("rescale, adamw", walk("rescale, adamw", sharding, rank, size, blocks=1), blocks=1)


@pytest.mark.parametrize(
    ("sharding", "rank"),
    [
        ("zero3", 511),
        *(
            pytest.param(sharding, rank, marks=pytest.mark.heavy)
            for sharding in SHARDINGS[1:]
            for rank in (0, 511, 1023)
            if (sharding, rank) != ("zero3", 511)
        ),
    ],
)
def test_one_rank_of_a_large_run(sharding: Sharding, rank: int) -> None:
    method = "rescale, paper"
    check(method, walk(method, sharding, rank, 1024, blocks=1), blocks=1)


@pytest.mark.parametrize("method", WAITS)
def test_neither_layers_nor_dtype_nor_moments_make_the_host_wait(method: str) -> None:
    few, many = (walk(method, "fsdp", 1, 8, blocks=blocks) for blocks in (1, 3))
    assert few.collectives.total() == many.collectives.total()
    if method != "carry, full":  # the solutions of few layers are summed, those of many gathered
        assert few.collectives == many.collectives
    check(method, many, blocks=3)
    check(method, walk(method, "fsdp", 1, 8, blocks=1, dtype=torch.float32), blocks=1)
    if method != "relora":  # it prunes moments
        check(method, walk(method, "zero1", 1, 8, blocks=1, moments=False), blocks=1)


class Faulty(Clock):
    """Makes a mistake where a part of the work begins."""

    def __init__(self, mistake: Callable[[], object]) -> None:
        self.mistake = mistake

    def begin(self, part: str) -> None:
        self.mistake()


@pytest.mark.parametrize("method", [*(f"rescale, {rule}" for rule in RULES), "lora-pro"])
@pytest.mark.parametrize("sharding", ["zero1", "zero3", "fsdp"])
def test_offloaded_factors_take_one_wait_more(method: str, sharding: Sharding) -> None:
    """One for all that is written back to the host's memory, and none for a layer."""
    for blocks in (1, 3):
        counts = walk(method, sharding, 3, 8, blocks=blocks, offloads=True)
        assert counts.waits == WAITS[method] + 1, counts.synchronisations


@pytest.mark.parametrize("sharding", ["zero3", "fsdp"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_pinned_weights_on_the_host_take_one_wait_more(sharding: Sharding, blocks: int) -> None:
    """Beside that of the offloaded factors: one for all layers, and none for a copy."""
    method = "rescale, paper"
    counts = walk(method, sharding, 3, 8, blocks=blocks, offloads=True, frozen_in="pinned")
    assert counts.waits == WAITS[method] + 2, counts.synchronisations


@pytest.mark.parametrize("blocks", [1, 3])
def test_pageable_weights_on_the_host_wait_for_each_piece(
    blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_pieces, "SLOT_BYTES", 256)  # 64 elements of W and its low half
    method = "rescale, paper"
    counts = walk(method, "zero3", 3, 8, blocks=blocks, offloads=True, frozen_in="pageable")
    pieces = blocks * sum(-(-m * n // 8 // 64) for m, n in SHAPES)
    assert counts.kernels["scalora.add_low_rank_"] == pieces
    assert counts.waits == WAITS[method] + 2 + pieces, counts.synchronisations


GEMMA = [(4096, 3840), (2048, 3840), (2048, 3840), (3840, 4096)]
GEMMA += [(15360, 3840), (15360, 3840), (3840, 15360)]
BLOCKS = 48  # of Gemma-3-12B: 336 layers


@pytest.mark.parametrize(
    ("sharding", "rank", "size"),
    [
        ("local", 0, 1),
        ("zero3", 512, 1024),
        *(
            pytest.param(sharding, rank, size, marks=pytest.mark.heavy)
            for sharding in SHARDINGS[1:]
            for rank, size in ((0, 8), (7, 8), (0, 16), (9, 16), (15, 16), (0, 1024), (1023, 1024))
        ),
    ],
)
def test_a_rescale_of_gemma_3_12b(sharding: Sharding, rank: int, size: int) -> None:
    """One kernel for each merge. All others depend on shapes, and not on the number of layers."""
    walked = partial(walk, "rescale, adamw", sharding, rank, size, shapes=GEMMA, r=8)
    counts = walked(blocks=BLOCKS)
    assert counts.kernels["scalora.add_low_rank_"] == BLOCKS * len(GEMMA)
    assert counts.total <= 600
    assert counts.waits == 2
    if size > 1:  # on one rank, all factors take several batches
        half = walked(blocks=BLOCKS // 2)
        more = counts.total - half.total - BLOCKS // 2 * len(GEMMA)
        assert more <= 60  # launches of operators that take some 100 tensors each


def on_gpu() -> Tensor:
    return torch.ones(len(SHAPES), device=CUDA)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: dist.all_reduce(torch.ones(2)), "NCCL takes GPU tensors"),
        (lambda: dist.all_gather_into_tensor(torch.ones(16), torch.ones(2)), "NCCL"),
        (lambda: on_gpu() + torch.ones(len(SHAPES)), "found at least two devices"),
    ],
)
def test_a_seeded_mistake_ends_the_walk(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(Exception, match=message):
        walk("rescale, paper", "fsdp", 0, 8, clock=Faulty(mistake))


@pytest.mark.parametrize(
    ("read", "operator"),
    [
        (lambda: [number.item() for number in on_gpu()], "_local_scalar_dense"),
        (lambda: on_gpu()[on_gpu() > 0], "index"),
        (lambda: torch.ones(3).to(CUDA), "_to_copy"),
    ],
)
def test_a_seeded_wait_is_counted(read: Callable[[], object], operator: str) -> None:
    counts = walk("rescale, paper", "fsdp", 0, 8, blocks=1, clock=Faulty(read))
    with pytest.raises(AssertionError, match=operator):
        check("rescale, paper", counts, blocks=1)


def test_every_walk_has_a_bound() -> None:
    assert set(WALKS) == set(WAITS) == set(KERNELS)


@pytest.mark.parametrize("size", [1, 3, 8, 16, 1024])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_ranges_cover_every_element_once(sharding: Sharding, size: int) -> None:
    shapes = [(25, 4), (7, 3), (1, 1), (48, 4)]
    ranges = ranges_of(sharding, shapes, size)
    assert ranges.shape == (size, len(shapes), 2) and ranges.dtype == torch.int64
    for i, (rows, cols) in enumerate(shapes):
        held = sorted((low, high) for low, high in ranges[:, i].tolist() if high > low)
        if sharding == "local":
            assert held == [(0, rows * cols)] * size
            continue
        assert [low for low, _ in held] == [0, *(high for _, high in held[:-1])]
        assert held[-1][1] == rows * cols
        if sharding == "fsdp":
            assert all(low % cols == 0 for low, _ in held)


def test_the_cpu_is_real_and_the_gpu_is_fake() -> None:
    with fake_gpu(2, 8) as world, KernelCount("cuda") as count:
        real = torch.arange(4.0)
        assert (real + 1).tolist() == [1, 2, 3, 4]
        assert not count.kernels
        there = host.to_device(real, world.device)
        assert there.device == CUDA and there.is_cuda
        assert not count.synchronisations  # from pinned memory
        assert host.on_host(lambda x: x.sum().item(), there * 2) == 4.0  # ones stand in
        assert dict(count.synchronisations) == {"synchronize": 1}
        weight = torch.ones(4, 4, device=CUDA, requires_grad=True)
        (weight @ there).sum().backward()
        assert weight.grad is not None and weight.grad.device == CUDA
        assert (world.rank, world.size, world.nodes) == (2, 8, 1)
        assert world.sum(1.0, 2.0) == [8.0, 16.0]
    assert not dist.is_initialized()
    assert torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None


def test_the_group_ends_with_an_error() -> None:
    with pytest.raises(KeyError), fake_gpu(0, 4):
        raise KeyError
    assert not dist.is_initialized()


def test_shards_are_those_of_their_rank() -> None:
    with fake_gpu(1, 8) as world:
        for sharding in SHARDINGS[1:]:
            for layer in fake_layers(world, sharding, SHAPES, rank=4, carry=8):
                shards: list[FlatShard] = [layer.A, layer.B, *layer.moments_A, *layer.moments_B]
                assert all(x.group is not None and x.local.is_cuda for x in shards)
                assert layer.A.local.shape == layer.grad_A.local.shape
                assert (layer.W.group is None) == (sharding == "zero1")
                assert layer.carry is not None and layer.carry[0].shape[1] == 8
