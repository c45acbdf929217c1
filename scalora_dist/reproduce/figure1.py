"""Figure 1 of the paper: loss, rank and alignment of GD on W, LoRA and ScaLoRA, each at its best.

Each method's step size is searched for on a grid that widens until the best is inside it; ScaLoRA's
``eta_lipschitz`` likewise. So no method wins by a step size that suits it better than others.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from scalora_dist.core.rank_sketch import numerical_rank
from scalora_dist.distributed.world import World
from scalora_dist.reproduce.regression import Layers, Method, Problem, descend

METHODS = {
    "full GD": Method("full"),
    "LoRA": Method("lora"),
    "ScaLoRA": Method("scalora"),
    "scalar": Method("scalora", rule="scalar"),
    "nnls": Method("scalora", rule="nnls"),
    "no bounds": Method("scalora", bounds=None),
    "interval 10": Method("scalora", interval=10),
}

# Exponents of the first grid. Step sizes are powers of √2 times eta_lipschitz / L: at power 0 the
# weight moves by about −∇ℓ / L. eta_lipschitz is a power of 2.
STEPS = range(-6, 3)
ETAS = range(-3, 5)
FURTHEST = 14  # no exponent beyond this


@dataclass
class Trace:
    """One descent, iteration by iteration.

    Attributes:
        loss: ℓ after each iteration.
        rank: numerical rank of W_t − W_0 after each iteration.
        cosine: between the iteration's change of W and −∇ℓ before it; this and the two last are 0
            where the descent has arrived, so that W does not change.
        bound: the quadratic upper bound (6) of ``loss``, from the weight before the iteration.
        bound_share: how far that bound is below the loss before, divided by ‖∇ℓ‖²/2L, the most that
            any change of W can reach.
        second_order: share of the change of W that is the product of A's and B's changes.
    """

    loss: list[float] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    bound: list[float] = field(default_factory=list)
    bound_share: list[float] = field(default_factory=list)
    second_order: list[float] = field(default_factory=list)


@dataclass
class Found:
    """A method at its best.

    Attributes:
        eta_l: the best step size η times the true L of the loss.
        eta_lipschitz: the best value of the option; 1 where the method does not read it.
        inside: whether the best lies inside the grid.
        grid: [power of √2, power of 2, last loss or None where it diverged] of each descent.
        trace: the descent at the best.
    """

    eta_l: float
    eta_lipschitz: float
    inside: bool
    grid: list[tuple[int, int, float | None]]
    trace: Trace


def search(problem: Problem, method: Method, world: World, *, rank: int, iterations: int) -> Found:
    """The best step size (and eta_lipschitz) by the last loss, and the descent with it."""
    curvature = problem.curvature
    losses: dict[tuple[int, int], float] = {}
    steps, etas = STEPS, ETAS if method.kind == "scalora" else range(0, 1)
    while True:
        for j in etas:
            new = [i for i in steps if (i, j) not in losses]
            if new:
                sizes = 2.0 ** (torch.tensor(new, dtype=torch.float64) / 2) * 2.0**j / curvature
                last = descend(
                    problem,
                    method,
                    world,
                    rank=rank,
                    iterations=iterations,
                    step_sizes=sizes,
                    eta_lipschitz=2.0**j,
                )
                losses |= {(i, j): loss for i, loss in zip(new, last.tolist(), strict=True)}
        best_i, best_j = min(losses, key=lambda at: losses[at])
        wider = _wider(steps, best_i), _wider(etas, best_j) if method.kind == "scalora" else etas
        if wider == (steps, etas):
            break
        steps, etas = wider
    eta_lipschitz = 2.0**best_j
    eta_l = 2.0 ** (best_i / 2) * eta_lipschitz
    return Found(
        eta_l=eta_l,
        eta_lipschitz=eta_lipschitz,
        inside=max(abs(best_i), abs(best_j)) < FURTHEST,
        grid=[(*at, loss if math.isfinite(loss) else None) for at, loss in losses.items()],
        trace=trace(
            problem,
            method,
            world,
            rank=rank,
            iterations=iterations,
            step_size=eta_l / curvature,
            eta_lipschitz=eta_lipschitz,
        ),
    )


def _wider(grid: range, best: int) -> range:
    """``grid`` with two more exponents on the side of ``best``, if that is at an edge."""
    if best == grid[0] and best > -FURTHEST:
        return range(max(grid[0] - 2, -FURTHEST), grid.stop)
    if best == grid[-1] and best < FURTHEST:
        return range(grid[0], min(grid.stop + 2, FURTHEST + 1))
    return grid


def trace(
    problem: Problem,
    method: Method,
    world: World,
    *,
    rank: int,
    iterations: int,
    step_size: float,
    eta_lipschitz: float,
) -> Trace:
    """Descend once and note each iteration."""
    found, curvature = Trace(), problem.curvature

    def watch(before: Tensor, gradient: Tensor, layers: Layers) -> None:
        after = layers.weights[0]
        moved, downhill = after - before[0], -gradient[0]
        inner = float((moved * downhill).sum())
        length, slope = float(moved.norm()), float(downhill.norm())
        moves = bool(length and slope)  # else the descent has arrived
        below = inner - curvature / 2 * length**2
        both = step_size**2 * layers.grad_A[0] @ layers.grad_B[0].T  # 0 for full GD
        found.loss.append(float(problem.loss(after)))
        found.rank.append(numerical_rank(after))
        found.cosine.append(inner / (length * slope) if moves else 0.0)
        found.bound.append(float(problem.loss(before[0]) - below))
        found.bound_share.append(2 * curvature * below / slope**2 if moves else 0.0)
        found.second_order.append(float(both.norm()) / length if moves else 0.0)

    descend(
        problem,
        method,
        world,
        rank=rank,
        iterations=iterations,
        step_sizes=torch.tensor([step_size], dtype=torch.float64),
        eta_lipschitz=eta_lipschitz,
        watch=watch,
    )
    return found


def figure1(
    world: World, *, ranks: list[int], features: int, samples: int, iterations: int, seed: int
) -> dict[str, Any]:
    """All methods at all ranks, ready for JSON."""
    problem = Problem.gaussian(features, samples, seed)
    zero = torch.zeros(features, features, dtype=torch.float64)
    results: dict[str, Any] = {}
    for rank in ranks:
        # GD on W does not depend on the rank.
        known = next((one["full GD"] for one in results.values()), None)
        results[str(rank)] = {
            name: known
            if known and method.kind == "full"
            else asdict(search(problem, method, world, rank=rank, iterations=iterations))
            for name, method in METHODS.items()
        }
    return {
        "features": features,
        "samples": samples,
        "iterations": iterations,
        "seed": seed,
        "curvature": problem.curvature,
        "first_loss": float(problem.loss(zero)),
        "least_loss": {str(rank): problem.least_loss(rank) for rank in ranks},
        "ranks": results,
    }


def table(data: dict[str, Any]) -> str:
    """Markdown: the paper's sentences beside what was measured, and each method at its best."""
    lines = [
        f"ℓ(W) = ½‖W X − Y‖², W {data['features']} × {data['features']}, {data['samples']} "
        f"samples, {data['iterations']} iterations of GD, seed {data['seed']}; ℓ(0) = "
        f"{data['first_loss']:.1f}.",
        "",
        "| the paper says (section 4.1, figure 1) | r | measured |",
        "|---|---|---|",
    ]
    for rank, methods in data["ranks"].items():
        lora, ours = methods["LoRA"]["trace"], methods["ScaLoRA"]["trace"]
        sooner = next((t for t, x in enumerate(ours["loss"], 1) if x <= lora["loss"][-1]), None)
        marks = [t for t in (1, 10, 25, 50, 100, 200) if t <= len(ours["rank"])]
        steps = ", ".join(f"{ours['rank'][t - 1]} (t = {t})" for t in marks)
        lines += [
            f"| ScaLoRA converges remarkably faster than LoRA | {rank} | last loss "
            f"{ours['loss'][-1]:.4g}, LoRA's {lora['loss'][-1]:.4g}; LoRA's last loss is reached "
            f"at iteration {sooner or '—'} |",
            f"| the rank of its cumulative update increases | {rank} | rank {steps}; LoRA's "
            f"{lora['rank'][-1]} |",
            f"| it is better aligned to full fine-tuning | {rank} | mean cosine "
            f"{_mean(ours['cosine']):.3f}, LoRA's {_mean(lora['cosine']):.3f} |",
            f"| it minimizes the quadratic upper bound (6) | {rank} | mean share of the most that "
            f"a change of W can lower the bound: {_mean(ours['bound_share']):.3f}, LoRA's "
            f"{_mean(lora['bound_share']):.3f} |",
        ]
    lines += [
        "",
        "| method | r | η·L | eta_lipschitz | inside the grid | last loss | rank | mean cosine | "
        "second order |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rank, methods in data["ranks"].items():
        least = data["least_loss"][rank]
        lines.append(f"| best W of rank {rank} | {rank} | | | | {least:.4g} | | | |")
        for name, found in methods.items():
            one = found["trace"]
            reads = METHODS[name].kind == "scalora"
            lines.append(
                f"| {name} | {rank} | {found['eta_l']:.3g} | "
                f"{found['eta_lipschitz'] if reads else ''} | {'yes' if found['inside'] else 'no'} "
                f"| {one['loss'][-1]:.4g} | {one['rank'][-1]} | {_mean(one['cosine']):.3f} | "
                f"{_mean(one['second_order']):.2f} |"
            )
    return "\n".join(lines) + "\n"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
