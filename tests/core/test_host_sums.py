"""Sums in the host's memory: pinned memory, events, and parts that are freed at once.

There is no GPU here. A stand-in for CUDA runs work late and in drawn orders, and uses memory again
as early as CUDA may.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from scalora_dist.core import host_sums
from scalora_dist.core.host_sums import HostSums
from tests.support.lazy_memory import LazyMemory

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
# Two layers in turn, then layers of other sizes. The values' sums depend on their order.
SHAPES = [(3, 5), (2, 4), (3, 5), (2, 4), (6, 7), (1, 1), (3, 5), (6, 7)]


def parts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * 10**i for i, shape in enumerate(SHAPES)]


def totals() -> dict[tuple[int, int], Tensor]:
    return {shape: torch.zeros(shape) for shape in SHAPES}


def expected() -> dict[tuple[int, int], Tensor]:
    found = totals()
    for part, shape in zip(parts(), SHAPES, strict=True):
        found[shape] += part
    return found


def summed(cuda: LazyMemory, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], Tensor]:
    """The sums of parts that are computed on the device, and freed when they were passed on."""
    monkeypatch.setattr(host_sums, "cuda", cuda)
    monkeypatch.setattr(host_sums, "pinned", lambda size: torch.zeros(size, dtype=torch.uint8))
    found = totals()
    with cuda:
        sums = HostSums(GPU)
        for values, shape in zip(parts(), SHAPES, strict=True):
            part = torch.empty_strided(values.shape, values.stride())
            cuda.launch("part", lambda part, values: part.copy_(values), part, values)
            sums.add_(found[shape], part)
            del part
        sums.wait()
        sums.wait()
    return found


@pytest.mark.parametrize("eager", [True, False])
def test_sums_are_the_same_bit_for_bit(monkeypatch: pytest.MonkeyPatch, eager: bool) -> None:
    for seed in range(4):
        cuda = LazyMemory(seed, "", eager=eager)
        found = summed(cuda, monkeypatch)
        assert all(torch.equal(found[shape], total) for shape, total in expected().items())
        assert cuda.host_waits <= len(SHAPES)


def test_the_device_may_be_a_part_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host adds a part while the next is copied."""
    cuda = LazyMemory(0, "", eager=False)
    monkeypatch.setattr(host_sums, "cuda", cuda)
    monkeypatch.setattr(host_sums, "pinned", lambda size: torch.zeros(size, dtype=torch.uint8))
    total, part = torch.zeros(3), torch.ones(3)
    with cuda:
        sums = HostSums(GPU)
        sums.add_(total, part)
        assert cuda.host_waits == 0
        sums.add_(total, part)
        assert cuda.host_waits == 1 and total.tolist() == [1, 1, 1]
        assert [name for name, *_ in cuda.main.queue] == ["copy", "record"]
        sums.wait()
    assert total.tolist() == [2, 2, 2]


def test_the_event_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the host did not wait for it, the sums would be wrong: the tests above would see it."""

    class Careless(host_sums.Slot):
        def begin(self, total: Tensor, part: Tensor, stream: Any) -> None:
            super().begin(total, part, stream)
            self.copied: Any = SimpleNamespace(synchronize=lambda: None, record=lambda stream: None)

    monkeypatch.setattr(host_sums, "Slot", Careless)
    found = summed(LazyMemory(0, "", eager=False), monkeypatch)
    assert any(not torch.equal(found[shape], total) for shape, total in expected().items())


def test_a_cpu_adds_at_once() -> None:
    sums, found = HostSums(CPU), totals()
    for part, shape in zip(parts(), SHAPES, strict=True):
        sums.add_(found[shape], part)
    assert all(torch.equal(found[shape], total) for shape, total in expected().items())
