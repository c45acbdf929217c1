"""What goes to the host, what stays, and that gradients are the same, bit for bit."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scalora_dist.modeling import offloaded_activations
from scalora_dist.modeling.offloaded_activations import (
    IN_FLIGHT,
    HostCopies,
    OffloadedActivations,
    offload_activations,
)

CPU = torch.device("cpu")


class Watched(HostCopies):
    """Remembers what was sent and fetched."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, ...]] = []
        self.fetched = 0

    def send(self, tensor: Tensor) -> Any:
        self.sent.append(tuple(tensor.shape))
        return super().send(tensor)

    def fetch(self, copy: Any) -> Tensor:
        self.fetched += 1
        return super().fetch(copy)


@pytest.fixture(autouse=True)
def no_threshold(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(offloaded_activations, "SMALLEST", 0)
    yield


def gradients(work: Any, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(work(*leaves).sum(), leaves))


def odd_views(x: Tensor, w: Tensor) -> Tensor:
    """Saves transposed, sliced, expanded and empty tensors, and one tensor in three nodes."""
    h = (x @ w).sin()
    left, right = h.chunk(2, dim=-1)
    turned = (left * right).t().exp().t()
    wide = turned.sum(-1, keepdim=True).expand_as(turned) * turned
    none = x[:0].exp().sum()
    return (wide * h.cos()[:, : wide.shape[1]] * h.tanh()[:, : wide.shape[1]]) + none


def test_gradients_are_the_same_bit_for_bit() -> None:
    torch.manual_seed(0)
    x, w = (torch.randn(6, size, requires_grad=True) for size in (6, 8))
    plain = gradients(odd_views, x, w)
    copies = Watched()

    def offloaded(x: Tensor, w: Tensor) -> Tensor:
        with OffloadedActivations(copies):
            return odd_views(x, w)

    for mine, theirs in zip(gradients(offloaded, x, w), plain, strict=True):
        assert torch.equal(mine, theirs)
    assert copies.fetched > 0


def test_a_tensor_goes_once_and_is_fetched_once() -> None:
    """x is saved by the adapters of q, k and v: one copy each way, and not three."""
    copies, x = Watched(), torch.randn(5, requires_grad=True)
    with OffloadedActivations(copies):
        h = x * 2.0
        total = h.sin() + h.cos() + h.tanh()
        for _ in range(IN_FLIGHT):  # so that h leaves the device
            total = total.sigmoid()
    assert len(copies.sent) == 1 + 1 + IN_FLIGHT  # h, tanh's output, and the sigmoids'
    total.sum().backward()
    assert copies.fetched == 2
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("offloads", [False, True])
def test_what_was_sent_takes_no_memory_on_the_device(offloads: bool) -> None:
    storages, x = [], torch.zeros(8, requires_grad=True)
    with OffloadedActivations(HostCopies()) if offloads else nullcontext():
        for _ in range(10):
            saved = x.exp()
            storages.append(weakref.ref(saved.untyped_storage()))
            x = saved - 1.0
            del saved
    alive = sum(storage() is not None for storage in storages)
    assert alive == (IN_FLIGHT if offloads else 10)
    x.sum().backward()
    assert not any(storage() for storage in storages)


def test_parameters_and_their_views_stay_and_small_tensors() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3))
            self.b = nn.Buffer(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return (x.exp() @ self.w.t().t()) * self.b

    model, copies = Model(), Watched()
    context = offload_activations(model, [], CPU, inside=True)
    context.copies = copies
    x = torch.randn(2, 4, requires_grad=True)
    model(x).sum().backward()
    assert (4, 3) not in copies.sent and (3,) not in copies.sent
    assert (2, 4) in copies.sent
    with torch.no_grad():
        copies.sent.clear()
        model(x)
    assert not copies.sent


def test_a_backward_reads_a_parameter_as_it_is_then() -> None:
    """ZeRO-3 frees a parameter after its layer's forward, and gathers it for the backward."""
    layer = nn.Linear(4, 3, bias=False)
    offload_activations(layer, [], CPU, inside=True)
    x = torch.randn(2, 4, requires_grad=True)
    whole = layer.weight.data
    freed = weakref.ref(whole.untyped_storage())
    y = layer(x)
    layer.weight.data, again = torch.empty(0), whole.clone()
    del whole
    assert freed() is None
    layer.weight.data = again
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, again.sum(0).expand(2, 4))


class Complex(nn.Module):
    """Turns pairs of features by a parameter, as Llama-4 does by a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, 2))
        self.z = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x) * torch.view_as_complex(self.w)
        h = turned * 1j
        both = (h * turned) + h.conj() * turned + h.conj().imag * self.z.conj().imag
        return torch.view_as_real(both * self.z.conj() * self.z)


def test_complex_views_conjugates_and_negatives() -> None:
    """A view of a parameter may have another dtype, or read other values."""
    torch.manual_seed(0)
    plain = Complex()
    offloading = copy.deepcopy(plain)
    offload_activations(offloading, [], CPU, inside=True)
    x = torch.randn(4, 3, 2, requires_grad=True)
    found = [
        torch.autograd.grad(model(x).sum(), (x, model.w, model.z)) for model in (plain, offloading)
    ]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


class Changed(nn.Module):
    """Changes in place what a node has saved.

    Attributes:
        what: "parameter", "view" (of a buffer's part), "input" or "output" of a node.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.w = nn.Parameter(torch.ones(4, 4))
        self.b = nn.Buffer(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2.0
        y = h.exp()
        z = y * 3.0 + h.sin() + x.sum(0) * self.b[4:] + x @ self.w
        with torch.no_grad():
            {"parameter": self.w, "view": self.b[4:], "input": h, "output": y}[self.what].add_(1.0)
        for _ in range(IN_FLIGHT):
            z = z.sigmoid()
        return z


@pytest.mark.parametrize("what", ["parameter", "view", "input", "output"])
@pytest.mark.parametrize("offloads", [False, True])
def test_what_was_changed_in_place_fails_the_backward(what: str, offloads: bool) -> None:
    model, x = Changed(what), torch.ones(4, 4, requires_grad=True)
    if offloads:
        offload_activations(model, [], CPU, inside=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(x).sum().backward()


@pytest.mark.parametrize("small", [False, True])
def test_tensors_that_stay_are_checked_too(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, and the last ones of a forward."""
    if small:
        monkeypatch.setattr(offloaded_activations, "SMALLEST", 10**6)
    x = torch.ones(4, requires_grad=True)
    with OffloadedActivations(HostCopies()):
        h = x * 2.0
        y = h.sin()
    with torch.no_grad():
        h.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
