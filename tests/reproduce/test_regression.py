"""The paper's linear regression (section 4.1, appendix C.2): rank is what LoRA lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scalora_dist.core.rank_sketch import numerical_rank
from scalora_dist.distributed.world import World
from scalora_dist.reproduce import plots
from scalora_dist.reproduce.figure1 import METHODS, Trace, figure1, search, table, trace
from scalora_dist.reproduce.regression import Layers, Method, Problem, descend
from tests.support.ranks import Ranks

BOUNDS = (0.05, 5.0)


def whitened(features: int) -> Problem:
    """As many samples as features, whose inputs are orthogonal: no direction is slow to learn."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, features, features, generator=generator, dtype=torch.float64)
    return Problem(features**0.5 * torch.linalg.qr(x).Q, y)


PROBLEMS = {"gaussian": Problem.gaussian(32, 24, seed=0), "whitened": whitened(32)}


def last_loss_and_rank(world: World, name: str, method: Method) -> tuple[float, int]:
    """After 150 steps of about −∇ℓ / L. Each rescale must keep what the layer computes."""
    problem, eta_lipschitz = PROBLEMS[name], 2.0
    step_size = eta_lipschitz / problem.curvature
    last: list[Tensor] = []

    def watch(before: Tensor, gradient: Tensor, layers: Layers) -> None:
        a, b = layers.A + step_size * layers.grad_A, layers.B + step_size * layers.grad_B
        assert (layers.W + a @ b.mT - before).norm() <= 1e-12 * (1 + before.norm())
        assert (gradient - problem.gradient(before)).norm() <= 1e-12 * gradient.norm()
        last[:] = [layers.weights[0]]

    sizes = torch.tensor([step_size], dtype=torch.float64)
    (loss,) = descend(
        problem,
        method,
        world,
        rank=2,
        iterations=150,
        step_sizes=sizes,
        eta_lipschitz=eta_lipschitz,
        watch=watch,
    ).tolist()
    return loss, numerical_rank(last[0])


@pytest.mark.parametrize(
    ("name", "rule", "bounds"),
    [
        ("gaussian", "paper", BOUNDS),
        ("gaussian", "nnls", BOUNDS),
        ("whitened", "paper", BOUNDS),
        ("whitened", "paper", None),
    ],
)
def test_scalora_goes_far_below_what_any_weight_of_its_rank_reaches(
    ranks: Callable[[int], Ranks], name: str, rule: str, bounds: tuple[float, float] | None
) -> None:
    method = Method("scalora", rule=rule, bounds=bounds)
    ((loss, rank),) = ranks(1).run(last_loss_and_rank, name, method)
    assert loss < PROBLEMS[name].least_loss(2) / 5
    assert rank >= 20


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_least_loss_is_that_of_the_best_factors(name: str) -> None:
    """Alternating least squares finds them; LoRA's factors cannot do better."""
    problem = PROBLEMS[name]
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(32, 2, generator=generator, dtype=torch.float64)
    for _ in range(300):
        a = problem.Y @ torch.linalg.pinv(b.T @ problem.X)
        b = (torch.linalg.pinv(a) @ problem.Y @ torch.linalg.pinv(problem.X)).T
    assert float(problem.loss(a @ b.T)) == pytest.approx(problem.least_loss(2), rel=1e-3)


def searched(world: World, name: str) -> dict[str, Any]:
    found = search(Problem.gaussian(16, 12, seed=0), METHODS[name], world, rank=2, iterations=50)
    return vars(found)


def test_at_its_best_step_scalora_beats_lora(ranks: Callable[[int], Ranks]) -> None:
    ours, lora, full = (ranks(1).run(searched, name)[0] for name in ("ScaLoRA", "LoRA", "full GD"))
    least = Problem.gaussian(16, 12, seed=0).least_loss(2)
    assert least < lora["trace"].loss[-1] < 1.1 * least  # no step size could do much better
    assert full["trace"].loss[-1] < ours["trace"].loss[-1] < least / 3
    assert max(lora["trace"].rank) == 2 and ours["trace"].rank[-1] > 8
    assert full["trace"].cosine == pytest.approx([1.0] * 50)
    for found in (ours, lora, full):
        assert found["inside"]
        trace = found["trace"]
        assert all(x <= b * (1 + 1e-9) for x, b in zip(trace.loss, trace.bound, strict=True))
        best = min(loss for *_, loss in found["grid"] if loss is not None)
        assert trace.loss[-1] == pytest.approx(best, rel=1e-6)


def arrived(world: World) -> Trace:
    problem = Problem.gaussian(4, 2, seed=0)
    return trace(
        problem,
        METHODS["full GD"],
        world,
        rank=2,
        iterations=600,
        step_size=1 / problem.curvature,
        eta_lipschitz=1.0,
    )


def test_a_descent_may_arrive(ranks: Callable[[int], Ranks]) -> None:
    """Its last steps change nothing at all."""
    (found,) = ranks(1).run(arrived)
    assert found.loss[-1] < 1e-25
    assert found.cosine[0] == pytest.approx(1.0) and found.cosine[-1] == 0.0


def written(world: World, folder: Path) -> str:
    data = figure1(world, ranks=[1, 2], features=8, samples=6, iterations=5, seed=0)
    plots.draw_figure1(data, folder / "figure1.png")
    return table(data)


@pytest.mark.heavy
def test_the_figure_and_its_table(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    (text,) = ranks(1).run(written, tmp_path)
    assert (tmp_path / "figure1.png").read_bytes().startswith(b"\x89PNG")
    for name in METHODS:
        assert text.count(f"\n| {name} | ") == 2, name
