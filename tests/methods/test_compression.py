"""The compression of a carry against dense float64 singular values, and the layer that has one."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalora_dist.layers.carry_linear import CarryLinear
from scalora_dist.methods.carry import compression

HALF_ULP = 2.0**-24  # of fp32, relative


def merged(m: int, n: int, merges: int, rank: int, spread: float) -> tuple[Tensor, Tensor]:
    """C and D as merges leave them: columns nearly parallel to earlier ones, the first r zero.

    Args:
        spread: decades over which the columns' weights lie.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    a, b, left, right = draw(m, rank), draw(n, rank), [], []
    for merge in range(merges):
        a, b = a + 0.1 * draw(m, rank), b + 0.1 * draw(n, rank)
        weights = draw(rank) * 10 ** (spread * (torch.rand(rank, generator=generator) - 0.5))
        left.append(a * weights * (merge > 0))
        right.append(b)
    return torch.cat(left, 1).float().double(), torch.cat(right, 1).float().double()


CASES = list(itertools.product([0.0, 2.0, 6.0], [(6, 24), (6, 8), (10, 32)]))


@pytest.mark.parametrize(("spread", "sizes"), CASES)
def test_the_compression_is_the_best_and_says_what_it_lost(
    spread: float, sizes: tuple[int, int]
) -> None:
    merges, rank = sizes
    C, D = merged(60, 50, merges, 4, spread)
    exact = C @ D.T
    done = compression(C.T @ C, D.T @ D, rank)
    # Kept in fp32, as the layer keeps it.
    found = (C @ done.on_C).float().double() @ (D @ done.on_D).float().double().T
    values = torch.linalg.svdvals(exact)
    best, error = float(values[rank:].norm()), float((exact - found).norm())
    norm = float(exact.norm())
    assert done.norm == pytest.approx(norm)
    assert best - 1e-12 * norm <= error <= done.lost
    # Besides the best approximation's loss: fp32's digits, and those that grams do not hold.
    assert done.lost <= 1.01 * best + 1e-6 * norm
    assert done.kept <= rank
    assert not done.on_C[:, done.kept :].any() and not done.on_D[:, done.kept :].any()


def test_columns_that_nothing_was_merged_into() -> None:
    C = torch.zeros(9, 6, dtype=torch.float64)
    done = compression(C.T @ C, C.T @ C, 4)
    assert (done.kept, done.lost, done.norm) == (0, 0.0, 0.0)
    assert not done.on_C.any() and not done.on_D.any()


def test_parallel_columns_become_one() -> None:
    column = torch.arange(1.0, 8.0, dtype=torch.float64)
    C = torch.stack([column, -2 * column, column * 0], dim=1)
    D = torch.stack([column[:5], column[:5], column[:5]], dim=1)
    done = compression(C.T @ C, D.T @ D, 3)
    assert done.kept == 1
    torch.testing.assert_close(C @ done.on_C @ (D @ done.on_D).T, C @ D.T)


def layer_with_carry(used: int, dtype: torch.dtype = torch.float64) -> CarryLinear:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    linear = nn.Linear(7, 5, dtype=dtype).requires_grad_(False)
    layer = CarryLinear.adapt(linear, draw(5, 2), draw(7, 2), scaling=0.7, dropout=0.0)
    layer.add_carry(6, dtype)
    layer.used = used
    layer.C.data[:, :used], layer.D.data[:, :used] = draw(5, used), draw(7, used)
    return layer


@pytest.mark.parametrize("used", [0, 3, 6])
def test_the_layer_with_its_gradients(used: int) -> None:
    layer = layer_with_carry(used)
    x = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    update = layer.A @ layer.B.T + layer.C @ layer.D.T
    expected = F.linear(x, layer.weight + layer.scaling * update, layer.bias)
    grad_y = torch.randn_like(expected)
    inputs = (x, layer.A, layer.B)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    for found, right in zip(
        torch.autograd.grad(y, inputs, grad_y),
        torch.autograd.grad(expected, inputs, grad_y),
        strict=True,
    ):
        torch.testing.assert_close(found, right)


def test_dropout_is_on_what_is_trained_alone() -> None:
    """As it is where merges go into W."""
    layer = layer_with_carry(4)
    layer.dropout = 0.5
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    weight = layer.weight + layer.scaling * layer.C @ layer.D.T
    expected = F.linear(x, weight, layer.bias) + layer.scaling * dropped @ layer.B @ layer.A.T
    torch.manual_seed(1)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    inputs = (x, layer.A, layer.B)
    grad_y = torch.randn_like(y)
    for found, right in zip(
        torch.autograd.grad(y, inputs, grad_y),
        torch.autograd.grad(expected, inputs, grad_y),
        strict=True,
    ):
        torch.testing.assert_close(found, right)
    layer.eval()
    update = layer.A @ layer.B.T + layer.C @ layer.D.T
    torch.testing.assert_close(
        layer(x[0]), F.linear(x[0], layer.weight + layer.scaling * update, layer.bias)
    )


def test_the_carry_is_no_third_product() -> None:
    """Forward and backward take as many matrix products as without it, and keep no copy of it."""

    def products(used: int) -> tuple[int, set[int]]:
        layer = layer_with_carry(used, torch.float32)
        kept: set[int] = set()

        def note(tensor: Tensor) -> Tensor:
            kept.add(tensor.data_ptr())
            return tensor

        with torch.profiler.profile() as profile:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                y = layer(torch.randn(4, 7, requires_grad=True))
            y.sum().backward()
        keys = ("aten::mm", "aten::addmm", "aten::addmm_")
        count = sum(e.count for e in profile.key_averages() if e.key in keys)
        return count, kept & {p.data_ptr() for p in (layer.C, layer.D)}

    (without, _), (count, kept) = products(0), products(6)
    assert count == without
    assert len(kept) == 2  # the parameters themselves
