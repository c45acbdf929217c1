"""The paper's linear regression (section 4.1, appendix C.2), by plain gradient descent in float64.

ScaLoRA is the package's own ``Rescaler`` on whole matrices. Descents that differ in the step size
alone run together, as layers of one rescaler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.layers.lora_init import lora_init
from scalora_dist.methods.merger import IntoWeights, Merger
from scalora_dist.methods.scalora import Rescaler
from scalora_dist.profiling.clock import Clock

DIVERGED = 1e3  # times the loss at the start: the descent is stopped


@dataclass(frozen=True)
class Problem:
    """ℓ(W) = ½‖W X − Y‖_F², from W = 0.

    Attributes:
        X: inputs (n, samples), float64.
        Y: targets (m, samples), float64.
    """

    X: Tensor
    Y: Tensor

    @classmethod
    def gaussian(cls, features: int, samples: int, seed: int) -> Problem:
        """Standard Gaussian X and Y, and a W of features × features."""
        generator = torch.Generator().manual_seed(seed)
        return cls(*torch.randn(2, features, samples, generator=generator, dtype=torch.float64))

    @property
    def curvature(self) -> float:
        """L, the Lipschitz constant of ∇ℓ."""
        return float(torch.linalg.svdvals(self.X)[0] ** 2)

    def loss(self, weights: Tensor) -> Tensor:
        """ℓ of each weight: (…, m, n) → (…)."""
        return 0.5 * (weights @ self.X - self.Y).square().sum((-2, -1))

    def gradient(self, weights: Tensor) -> Tensor:
        """∇ℓ at each weight, (…, m, n)."""
        return (weights @ self.X - self.Y) @ self.X.T

    def least_loss(self, rank: int) -> float:
        """The least ℓ of a weight of at most that rank (reduced-rank regression)."""
        reached = torch.linalg.pinv(self.X) @ self.X  # projects on the rows of X
        values = torch.linalg.svdvals(self.Y @ reached)
        return 0.5 * float(self.Y.square().sum() - values[:rank].square().sum())


@dataclass(frozen=True)
class Method:
    """A way to descend.

    Attributes:
        kind: "full" trains W, "lora" A and B, "scalora" A and B with rescales.
        rule: as for ``solve``; "scalora" only, like the next two.
        bounds: as for ``solve``.
        interval: I of ScaLoRA-I.
    """

    kind: str
    rule: str = "paper"
    bounds: tuple[float, float] | None = (0.05, 5.0)
    interval: int = 1


class Layers:
    """Copies of one layer y = W x + A (Bᵀ x), s = 1, that train apart from one another.

    Attributes:
        W: frozen weights (copies, m, n), float64, 0 at the start.
        A: factors (copies, m, r), float64, 0 at the start.
        B: factors (copies, n, r), float64, of ``lora_init``.
        grad_A: gradients like ``A``.
        grad_B: gradients like ``B``.
        shards: the copies, as an engine shows them: whole matrices.
    """

    def __init__(self, problem: Problem, rank: int, copies: int) -> None:
        m, n = len(problem.Y), len(problem.X)
        a, b = lora_init("layer", m, n, rank, seed=0, dtype=torch.float64)
        self.W = torch.zeros(copies, m, n, dtype=torch.float64)
        self.A = a.repeat(copies, 1, 1)
        self.B = b.repeat(copies, 1, 1)
        self.grad_A = torch.zeros_like(self.A)
        self.grad_B = torch.zeros_like(self.B)
        self.shards = [
            LayerShards(
                name=str(i),
                scaling=1.0,
                W=_whole(self.W[i]),
                A=_whole(self.A[i]),
                B=_whole(self.B[i]),
                grad_A=_whole(self.grad_A[i]),
                grad_B=_whole(self.grad_B[i]),
                moments_A=(),
                moments_B=(),
            )
            for i in range(copies)
        ]

    @property
    def weights(self) -> Tensor:
        """What the copies compute with: W + A Bᵀ, (copies, m, n). Also their updates, W_0 = 0."""
        return self.W + self.A @ self.B.mT


def _whole(matrix: Tensor) -> FlatShard:
    return FlatShard(matrix.view(-1), 0, (matrix.shape[0], matrix.shape[1]))


# Called after each step with the weights before it, the gradients there, and the layers.
Watch = Callable[[Tensor, Tensor, Layers], None]


def descend(
    problem: Problem,
    method: Method,
    world: World,
    *,
    rank: int,
    iterations: int,
    step_sizes: Tensor,
    eta_lipschitz: float = 1.0,
    watch: Watch | None = None,
) -> Tensor:
    """Descend from W = 0 once with each step size.

    Args:
        world: one rank.
        step_sizes: η of each descent, (descents,) float64.
        eta_lipschitz: as for ``solve``; read by "scalora" only.
        watch: is called after each step.

    Returns:
        the last losses (descents,) float64; infinite where the descent diverged.
    """
    layers = Layers(problem, rank, len(step_sizes))
    step = step_sizes[:, None, None]
    rescaler = None
    if method.kind == "scalora":
        target = IntoWeights(layers.shards, "nearest")  # float64 has no low halves
        rescaler = Rescaler(
            Merger(layers.shards, world, target),
            rule=method.rule,
            eta_lipschitz=eta_lipschitz,
            bounds=method.bounds,
            interval=method.interval,
        )
    weights = layers.weights
    losses = problem.loss(weights)
    limit = DIVERGED * losses
    for taken in range(iterations):
        # A descent that diverged stands still: without a gradient a rescale leaves it alone too.
        going = (losses < limit).double()[:, None, None]
        gradient = going * problem.gradient(weights)
        if method.kind == "full":
            layers.W -= step * gradient
        else:
            layers.grad_A.copy_(gradient @ layers.B)
            layers.grad_B.copy_(gradient.mT @ layers.A)
            if rescaler and rescaler.due(taken):
                rescaler(layers.shards, Clock())
            layers.A -= step * layers.grad_A
            layers.B -= step * layers.grad_B
        before, weights = weights, layers.weights
        losses = problem.loss(weights)
        if watch:
            watch(before, gradient, layers)
    return losses.where(losses < limit, torch.inf)
