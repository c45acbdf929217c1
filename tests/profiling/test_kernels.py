"""Counts of kernels, bytes and host synchronisations against counts made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from scalora_dist.profiling.kernels import Counts, KernelCount
from scalora_dist.profiling.launches import CHUNK, CHUNKS, foreach_launches


def counted(work: Callable[[], object]) -> Counts:
    with KernelCount() as count:
        work()
    return count.take()


def test_views_and_allocations_launch_nothing() -> None:
    x = torch.ones(4, 6)

    def work() -> None:
        torch.empty(3, 3)
        x.view(-1)[2:8].view(2, 3).t()
        x.detach().unsqueeze(0).expand(5, 4, 6).split(2)
        torch.empty_like(x)

    counts = counted(work)
    assert (counts.total, counts.read, counts.written, counts.waits) == (0, 0, 0, 0)


def test_one_launch_per_operator_after_torch_split_it_up() -> None:
    x = torch.ones(4, 4)
    counts = counted(lambda: F.linear(x, x) + x)
    assert dict(counts.kernels) == {"aten.mm": 1, "aten.add": 1}
    assert counted(lambda: torch.isfinite(x)).total == 4  # abs, ne, eq, mul
    assert counted(lambda: F.pad(x, (1, 1))).total == 2
    assert counted(lambda: torch.addmm(x[0], x, x)).total == 1
    assert counted(lambda: torch.addmm(x, x, x)).total == 2
    assert counted(lambda: x.clone().addmm_(x, x)).total == 2


@pytest.mark.parametrize(("tensors", "launches"), [(1, 1), (128, 1), (129, 2), (300, 3)])
def test_cat_launches_once_per_128_tensors(tensors: int, launches: int) -> None:
    parts = [torch.ones(2, 2)] * tensors
    assert counted(lambda: torch.cat(parts)).total == launches
    assert counted(lambda: torch.stack(parts)).total == launches
    empty = [torch.ones(0, 2)] * 500
    assert counted(lambda: torch.cat(parts + empty)).total == launches


def test_cat_of_what_it_cannot_batch() -> None:
    strided = [torch.ones(2, 3).T] * 129
    assert counted(lambda: torch.cat(strided)).total == 3  # 64 a launch
    mixed = [torch.ones(2), torch.ones(2, dtype=torch.float64), torch.ones(2)]
    assert counted(lambda: torch.cat(mixed)).total == 3


def fill(sizes: list[int], depth: int) -> int:
    """Launches of multi_tensor_apply, counted as its source does, chunk by chunk."""
    most = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}[depth]
    launches = blocks = tensors = 0
    for size in sizes:
        chunks = -(-size // CHUNK)
        tensors += 1 if size else 0
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if (tensors == most and last) or blocks == CHUNKS:
                launches, blocks, tensors = launches + 1, 0, 0 if last else 1
    return launches + (blocks > 0)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "sizes",
    [
        [8],
        [8] * 500,
        [0, 8, 0],
        [CHUNK * CHUNKS],
        [CHUNK * CHUNKS + 1, 8],
        [8] * 109 + [CHUNK * CHUNKS * 3] + [8] * 40,
        [CHUNK * 7] * 130,
    ],
)
def test_foreach_fills_its_launches_as_cuda_does(sizes: list[int], depth: int) -> None:
    with FakeTensorMode():
        tensors = [torch.empty(size) for size in sizes]
        assert foreach_launches([tensors] * depth) == fill(sizes, depth)


def test_foreach_counts_the_lists_that_it_reads_and_writes() -> None:
    xs, ys = [torch.ones(4, 4)] * 110, [torch.ones(4, 4)] * 110
    assert counted(lambda: torch._foreach_zero_(xs)).total == 1
    assert counted(lambda: torch._foreach_mul_(xs, 2.0)).total == 1
    assert counted(lambda: torch._foreach_mul(xs, 2.0)).total == 2  # 64 a launch
    assert counted(lambda: torch._foreach_mul_(xs, ys)).total == 2
    assert counted(lambda: torch._foreach_mul(xs, ys)).total == 3
    assert counted(lambda: torch._foreach_mul_(xs, [2.0] * 110)).total == 2  # 96 a launch
    assert counted(lambda: torch._foreach_addcmul_(xs, ys, ys, 1.0)).total == 3
    assert counted(lambda: torch._foreach_norm(xs)).total == 1 + 2


def test_foreach_off_its_fast_way_launches_once_per_tensor() -> None:
    xs = [torch.ones(4, 4)] * 10
    strided = [torch.ones(4, 8)[:, ::2]] * 10
    half = [torch.ones(4, 4, dtype=torch.bfloat16)] * 10
    assert counted(lambda: torch._foreach_mul_(xs, xs)).total == 1
    assert counted(lambda: torch._foreach_mul_(xs, strided)).total == 10
    row = [torch.ones(4)] * 10
    assert counted(lambda: torch._foreach_mul_(xs, row)).total == 10
    assert counted(lambda: torch._foreach_mul_(xs, half)).total == 10
    assert counted(lambda: torch._foreach_mul_(xs[:9] + half[:1], 2.0)).total == 10
    assert counted(lambda: torch._foreach_copy_(half, xs)).total == 1  # copies convert


def test_the_fused_optimizer_launches_36_tensors_at_a_time() -> None:
    parameters = [torch.nn.Parameter(torch.ones(4)) for _ in range(72)]
    for p in parameters:
        p.grad = torch.ones(4)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    optimizer.step()
    kernels = counted(optimizer.step).kernels
    assert kernels["aten._fused_adamw_"] == 2


def test_bytes() -> None:
    x, y = torch.ones(4, 8), torch.ones(8, 16, dtype=torch.float32)

    def of(work: Callable[[], object]) -> tuple[int, int]:
        counts = counted(work)
        return counts.read, counts.written

    assert of(lambda: x @ y) == (4 * 8 * 4 + 8 * 16 * 4, 4 * 16 * 4)
    assert of(lambda: x.mul_(2)) == (128, 128)
    row = torch.ones(8)
    assert of(lambda: x.copy_(row)) == (32, 128)
    assert of(lambda: x + x[:1].expand(4, 8)) == (128 + 32, 128)
    assert of(lambda: x.zero_()) == (0, 128)
    assert of(lambda: x.to(torch.float64)) == (128, 256)
    rows = torch.tensor([1, 2])
    assert of(lambda: y[rows]) == (128 + 16, 128)
    assert of(lambda: torch._foreach_mul_([x, x], 2.0)) == (256, 256)
    out = torch.empty(4, 8)
    assert of(lambda: torch.add(x, x, out=out))[1] == 128


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


@pytest.mark.parametrize(
    ("work", "operator"),
    [
        (lambda x, host: x.sum().item(), "aten._local_scalar_dense"),
        (lambda x, host: bool(x[0, 0] > 0), "aten._local_scalar_dense"),
        (lambda x, host: x.cpu(), "aten._to_copy"),
        (lambda x, host: host.copy_(x), "aten.copy_"),
        (lambda x, host: x.copy_(host), "aten.copy_"),
        (lambda x, host: host.to(x.device, non_blocking=True), "aten._to_copy"),
        (lambda x, host: torch.equal(x, x), "aten.equal"),
        (lambda x, host: x.nonzero(), "aten.nonzero"),
        (lambda x, host: x[x > 0], "aten.index"),
        (lambda x, host: x[torch.empty(3, dtype=torch.int64)], "aten.index"),
        (lambda x, host: torch.linalg.eigh(x), "aten._linalg_eigh"),
    ],
)
def test_the_host_waits(
    fake: None, work: Callable[[Tensor, Tensor], object], operator: str
) -> None:
    # "meta" stands for the device: this build of torch may have no other.
    x, host = torch.empty(4, 4, device="meta"), torch.empty(4, 4)
    with KernelCount("meta") as count:
        try:
            work(x, host)
        except Exception as error:  # a fake tensor has no values
            assert "DataDependent" in type(error).__name__ or "Dynamic" in type(error).__name__
    assert dict(count.synchronisations) == {operator: 1}


def test_the_host_does_not_wait(fake: None) -> None:
    x, host = torch.empty(4, 4, device="meta"), torch.empty(4, 4)
    with KernelCount("meta") as count:
        x.to("cpu", non_blocking=True)
        x[torch.empty(3, dtype=torch.int64, device="meta")]
        x.masked_fill_(x > 0, 1.0)
        host.sum().to(torch.float64)
    assert not count.synchronisations
    assert "aten.sum" not in count.kernels  # on the host


def test_phases() -> None:
    x = torch.ones(2)
    with KernelCount() as count:
        x.add_(1)
        first = count.take()
        x.mul_(2).mul_(2)
        second = count.take()
    assert dict(first.kernels) == {"aten.add_": 1}
    assert dict(second.kernels) == {"aten.mul_": 2}
    assert count.total == 0
    both = first + second
    assert (both.total, both.read, both.written) == (3, 24, 24)
