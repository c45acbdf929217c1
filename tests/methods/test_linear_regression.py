"""The paper's linear regression (section 4.1, appendix C.2): rank is what LoRA lacks.

Plain gradient descent on ½‖W X − Y‖² with Gaussian X and Y, 64 × 64 weights and r = 4, from W = 0.
Each method gets the best of its own small grid of step sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from scalora_dist.core.flat_shard import FlatShard, Layout
from scalora_dist.core.rank_sketch import numerical_rank
from scalora_dist.core.scale_solver import solve
from scalora_dist.core.split_precision import add_low_rank_
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.layers.lora_init import lora_init
from scalora_dist.methods.scalora import scale_factors_

FEATURES, RANK, STEPS, SCALING = 64, 4, 200, 1.0
BOUNDS = (0.05, 5.0)


@dataclass(frozen=True)
class Problem:
    X: Tensor  # (FEATURES, samples)
    Y: Tensor  # (FEATURES, samples)

    @property
    def curvature(self) -> float:
        """L, of the loss as a function of W."""
        return float(torch.linalg.svdvals(self.X)[0] ** 2)

    def loss(self, weight: Tensor) -> float:
        return 0.5 * float((weight @ self.X - self.Y).square().sum())

    def gradient(self, weight: Tensor) -> Tensor:
        return (weight @ self.X - self.Y) @ self.X.T

    def least_loss(self, rank: int) -> float:
        """Over weights of that rank (Eckart and Young; X has full rank, W X reaches all of it)."""
        return 0.5 * float(torch.linalg.svdvals(self.Y)[rank:].square().sum())


def gaussian() -> Problem:
    """Fewer samples than features, so that the loss can reach 0 and in 200 steps nearly does."""
    generator = torch.Generator().manual_seed(0)
    return Problem(*torch.randn(2, FEATURES, 48, generator=generator, dtype=torch.float64))


def whitened() -> Problem:
    """64 samples whose inputs are orthogonal: every direction can be learned equally fast."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, FEATURES, FEATURES, generator=generator, dtype=torch.float64)
    return Problem(FEATURES**0.5 * torch.linalg.qr(x).Q, y)


def whole(matrix: Tensor) -> FlatShard:
    return FlatShard(matrix.view(-1), 0, (len(matrix), matrix.shape[1]))


class Layer:
    """One layer in one process, with its factors' gradients."""

    def __init__(self) -> None:
        self.W = torch.zeros(FEATURES, FEATURES, dtype=torch.float64)
        init = lora_init("layer", FEATURES, FEATURES, RANK, seed=0, dtype=torch.float64)
        self.A, self.B = init
        self.grad_A, self.grad_B = torch.zeros_like(self.A), torch.zeros_like(self.B)
        self.shards = LayerShards(
            name="layer",
            scaling=SCALING,
            W=whole(self.W),
            A=whole(self.A),
            B=whole(self.B),
            grad_A=whole(self.grad_A),
            grad_B=whole(self.grad_B),
            moments_A=(),
            moments_B=(),
        )
        self.layout = Layout.of([self.shards.A, self.shards.B])

    @property
    def weight(self) -> Tensor:
        """What the layer computes with; the update itself, as W began at 0."""
        return self.W + SCALING * self.A @ self.B.T

    def backward(self, problem: Problem) -> None:
        gradient = problem.gradient(self.weight)
        self.grad_A.copy_(SCALING * gradient @ self.B)
        self.grad_B.copy_(SCALING * gradient.T @ self.A)

    def rescale(self, eta_lipschitz: float, rule: str, bounds: tuple[float, float] | None) -> None:
        layer = self.shards
        gram_a, gram_b = self.layout.grams([(layer.A, layer.grad_A), (layer.B, layer.grad_B)])
        scales = solve(
            gram_a[None],
            gram_b[None],
            scaling=SCALING,
            eta_lipschitz=eta_lipschitz,
            rule=rule,
            bounds=bounds,
        )
        merged = SCALING * (1 - scales.alpha * scales.beta)
        add_low_rank_(layer.W, self.A * merged, self.B, None)
        scale_factors_([layer], scales)

    def step(self, learning_rate: float) -> None:
        self.A -= learning_rate * self.grad_A
        self.B -= learning_rate * self.grad_B


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def best_lora(build: Callable[[], Problem]) -> Tensor:
    """LoRA's update after the best of five gradient descents."""
    problem, updates = build(), []
    for step_size in (0.1, 0.3, 0.6, 1.0, 1.5):
        layer = Layer()
        for _ in range(STEPS):
            layer.backward(problem)
            layer.step(step_size / problem.curvature)
        updates.append(layer.weight)
    return best(problem, updates)


def scalora(
    problem: Problem,
    step_size: float,
    eta_lipschitz: float,
    rule: str,
    bounds: tuple[float, float] | None,
) -> Tensor:
    """The update after ScaLoRA's descent; the weight moves by about ``step_size`` / L times −G."""
    layer = Layer()
    for _ in range(STEPS):
        layer.backward(problem)
        before = layer.weight
        layer.rescale(eta_lipschitz, rule, bounds)
        assert (layer.weight - before).norm() <= 1e-12 * (1 + before.norm())
        layer.step(step_size * eta_lipschitz / problem.curvature)
        if not problem.loss(layer.weight) < 1e6:  # this step size diverges
            break
    return layer.weight


def best(problem: Problem, updates: list[Tensor]) -> Tensor:
    finite = [update for update in updates if update.isfinite().all()]
    return min(finite, key=problem.loss)


@pytest.mark.parametrize(("rule", "bounds"), [("paper", BOUNDS), ("paper", None), ("nnls", BOUNDS)])
@pytest.mark.parametrize("build", [gaussian, whitened])
def test_scalora_goes_far_below_loras_loss(
    build: Callable[[], Problem], rule: str, bounds: tuple[float, float] | None
) -> None:
    problem = build()
    stalled = best_lora(build)
    assert numerical_rank(stalled) == RANK
    floor = problem.least_loss(RANK)
    assert floor <= problem.loss(stalled) < 1.1 * floor  # no step size could have done much better

    update = best(
        problem,
        [
            scalora(problem, size, eta_lipschitz, rule, bounds)
            for size in (0.5, 1.0)
            for eta_lipschitz in (2.0, 4.0)
        ],
    )
    assert problem.loss(update) < problem.loss(stalled) / 10
    assert numerical_rank(update) >= 10 * RANK


def test_full_descent_shows_that_the_problems_can_be_learned() -> None:
    for problem in (gaussian(), whitened()):
        weight = torch.zeros(FEATURES, FEATURES, dtype=torch.float64)
        for _ in range(STEPS):
            weight -= problem.gradient(weight) / problem.curvature
        assert problem.loss(weight) < 0.01 * problem.loss(torch.zeros_like(weight))
