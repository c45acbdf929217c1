"""Copies of activations on a stream of their own: streams, events, and memory that is used again.

There is no GPU here. A stand-in for CUDA runs work late and in drawn orders, and uses memory again
as early as CUDA may.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scalora_dist.modeling import offloaded_activations
from scalora_dist.modeling.offloaded_activations import (
    AHEAD,
    IN_FLIGHT,
    OffloadedActivations,
    StreamedCopies,
)
from tests.support.lazy_memory import LazyMemory

NODES = 30
CPU = torch.device("cpu")  # in the part of the GPU


def sine(cuda: LazyMemory, x: Tensor) -> Tensor:
    """``x.sin()``, whose forward and backward are queued on the main stream."""

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            y = torch.empty_strided(x.shape, x.stride())
            cuda.launch("sin", lambda x, y: y.copy_(x.sin()), x, y)
            return y

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            g = torch.empty_strided(x.shape, x.stride())
            cuda.launch("cos", lambda x, of, g: g.copy_(of * x.cos()), x, gradient, g)
            return g

    result: Tensor = Sine.apply(x)
    return result


def inputs() -> Tensor:
    return torch.linspace(0.1, 1.5, 7, requires_grad=True)


def expected() -> Tensor:
    x = y = inputs()
    for _ in range(NODES):
        y = y.sin()
    return torch.autograd.grad(y, x, torch.ones(7))[0]


def offloaded(cuda: LazyMemory, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The gradient of each of two micro-batches, twice. The host waits for it only at the end."""
    monkeypatch.setattr(offloaded_activations, "cuda", cuda)
    monkeypatch.setattr(offloaded_activations, "SMALLEST", 0)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: cuda.record_stream(x, stream))
    found: list[Tensor] = []
    ones = torch.ones(7)
    with cuda:
        context = OffloadedActivations(StreamedCopies(CPU))
        for _ in range(2):
            x, waits = inputs(), cuda.host_waits
            y = x
            with context:
                for _ in range(NODES):
                    y = sine(cuda, y)
            assert cuda.host_waits == waits  # not in a forward
            for again in (True, False):
                found += torch.autograd.grad(y, x, ones, retain_graph=again)
            del x, y
        cuda.main.record_event().synchronize()
    return found


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("prefer", ["", "main", "copies"])
def test_gradients_are_the_same_bit_for_bit_in_every_order(
    monkeypatch: pytest.MonkeyPatch, prefer: str, eager: bool
) -> None:
    for seed in range(1 if prefer else 4):
        cuda = LazyMemory(seed, prefer, eager=eager)
        for gradient in offloaded(cuda, monkeypatch):
            assert torch.equal(gradient, expected())


def test_the_device_holds_no_more_than_some_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the device is behind, as the memory of what it has not used yet is not free."""
    cuda = LazyMemory(0, "main", eager=False)
    offloaded(cuda, monkeypatch)
    # Beside what was sent or fetched last: a node's tensors, and the gradients found so far.
    assert cuda.most <= IN_FLIGHT + AHEAD + 6 < NODES
    fetched = 2 * (NODES - IN_FLIGHT + NODES)  # by the second backward all
    assert 0 < cuda.host_waits <= fetched - AHEAD + 1  # 1: for the gradients
