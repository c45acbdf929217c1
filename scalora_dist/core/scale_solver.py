"""Solves for α and β, the scales of the columns of A and B at one ScaLoRA step, from grams.

With z = ηL s²·[α²; β²], the step of the scaled factors is nearest to a step of full fine-tuning at
the minimum of

    zᵀ H z − 2 λᵀ z,   z ≥ 0        (ScaLoRA, equation 10, appendix A.3)

This is a convex quadratic in 2r unknowns per layer. Everything is float64, batched over layers that
do not depend on one another. No process group is needed.

**AdamW.** A gradient step of A grows with β², since its gradient does with β. An AdamW step grows
with β: its direction N = m̂/(√v̂ + ε) stays as it is. So rule "adamw" has z = √(ηL) s·[α; β], with
N_A and N_B in place of ∇A and ∇B, and λ = [‖a_k‖‖n_bk‖²; ‖b_k‖‖n_ak‖²] (docs/method.md).

**Units.** The code solves for x_k = √H_kk z_k. In these unknowns, H becomes a matrix of
correlations C (unit diagonal), and λ becomes c_k = ‖∇b_k‖/‖a_k‖ (‖∇a_k‖/‖b_k‖ for β), for AdamW
c_k = ‖n_bk‖ (‖n_ak‖). x_k / c_k = z_k‖a_k‖² is the square of the scaled column's size
s·√(ηL)·α_k‖a_k‖, for AdamW x_k / c_k = z_k‖a_k‖ is the size itself. An unknown that is solved alone
gives the size 1. Bounds on sizes are a box, c·lo² ≤ x ≤ c·hi² (for AdamW c·lo ≤ x ≤ c·hi). Only
ratios of gradients matter, so a factor that all have changes nothing.

**Free unknowns.** α_k has no effect where column k of A or of B's gradient is zero (A and B swapped
for β_k). Such a scale is 1, and the unknown is left out of the problem. A start at A = 0 gives
exact zeros. The first three constants define what else counts as zero.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
from torch import Tensor

SCALING_RULES = ("paper", "scalar", "nnls", "adamw")

# Squared norms below float32's smallest normal number, squared: from subnormals, which lost digits.
_TINY = torch.finfo(torch.float32).tiny ** 2
# Columns of A or B below 1e-12 of size 1 (see Units): α² stays finite in float32, for the moments.
_ZERO_SIZE = 1e-12
# A c_k below 1e-12 of its layer's largest: _TOLERANCE could not resolve it.
_ZERO_GRADIENT = 1e-12

_NO_BOUNDS = (1e-6, 1e6)  # size limits for bounds=None: no scale is zero or infinite
_TOLERANCE = 1e-12  # on the natural residual, relative to max|c| + max|x|
_RIDGE = 1e-13  # added to Newton matrices' unit diagonal: changes the steps, not the solution
_CORRECTED_STEPS, _MAX_STEPS = 15, 60


class Rule(enum.IntEnum):
    """How a layer's scales were found."""

    SKIPPED = 0
    COLUMN = 1
    SCALAR = 2
    NNLS = 3
    KEPT = 4  # so close to 1 that A and B stay unscaled; `solve` does not return it


class Scales(NamedTuple):
    """The scales of the columns of A and B, and the rule that found them for each layer."""

    alpha: Tensor  # (layers, r) float64
    beta: Tensor  # (layers, r) float64
    rule: Tensor  # (layers,) int64, values of Rule


def quadratic(gram_a: Tensor, gram_b: Tensor) -> tuple[Tensor, Tensor]:
    """H = (S_AᵀS_A) ∘ (S_BᵀS_B), S_A = [A, ∇A], S_B = [∇B, B], and λ (Theorem 5, by Lemma 7).

    Args:
        gram_a: [A, ∇A]ᵀ[A, ∇A], (layers, 2r, 2r).
        gram_b: [B, ∇B]ᵀ[B, ∇B], (layers, 2r, 2r); its two halves are swapped here.

    Returns:
        H (layers, 2r, 2r) and λ = [diag ∇Bᵀ∇B; diag ∇Aᵀ∇A] (layers, 2r), for unknowns [α; β].
    """
    r = gram_a.shape[-1] // 2
    swapped = gram_b.roll((r, r), dims=(-2, -1))
    lam = torch.cat((_diagonal(swapped)[:, :r], _diagonal(gram_a)[:, r:]), dim=-1)
    return gram_a * swapped, lam


@torch.no_grad()
def solve(
    gram_a: Tensor,
    gram_b: Tensor,
    *,
    scaling: float,
    eta_lipschitz: float,
    rule: str,
    bounds: tuple[float, float] | None,
) -> Scales:
    """Choose α and β for every layer.

    Rule "paper" takes the column solution z = H⁺λ (Theorem 5) where it is positive and inside the
    bounds. Otherwise it takes the scalar solution (Theorem 3), clipped entry by entry. "scalar"
    always takes the latter. "nnls" solves the bounded problem exactly; where the solution of
    Theorem 5 is already the optimum, it returns Rule.COLUMN. "adamw" does the same for the problem
    of AdamW's step.

    Args:
        gram_a: as for `quadratic`, with N in place of ∇ for rule "adamw". A layer whose grams are
            not finite, or that has no gradient, is SKIPPED with all scales 1. Other layers are not
            affected.
        gram_b: as for `quadratic`.
        scaling: s of y = W x + s·A(Bᵀx).
        eta_lipschitz: the product ηL; only the product matters.
        rule: one of ``SCALING_RULES``.
        bounds: (lo, hi) for the sizes s·√(ηL)·‖column‖ of the scaled columns. None follows the
            paper exactly, except that sizes outside [1e-6, 1e6] are clipped.

    Raises:
        ValueError: an unknown rule, or a number out of range.
    """
    _check(scaling, eta_lipschitz, rule, bounds)
    low, high = (0.0, _NO_BOUNDS[1]) if bounds is None else bounds
    unit = scaling * eta_lipschitz**0.5
    power = 1 if rule == "adamw" else 2  # x / c is a column's size to this power
    corr, c, norm, free = _equilibrate(gram_a, gram_b, unit, power)
    # A free unknown is uncorrelated and has c = 0, so x = 0; its box must only contain 0.
    lower = (c * low**power).masked_fill(free, -1.0)
    upper = (c * high**power).masked_fill(free, 1.0)
    problem = _BoxProblem(corr, c, lower, upper)

    x = problem.clip(_scalar(corr, c, norm, power))
    found = torch.full(c.shape[:1], int(Rule.SCALAR), device=c.device)  # (layers,)
    if rule != "scalar":
        column = _pinv_apply(corr, c)
        # With bounds=None the only condition is the paper's: positive.
        inside = (column > 0) if bounds is None else (column >= lower) & (column <= upper)
        inside = (inside | free).all(-1)  # (layers,)
        if rule in ("nnls", "adamw"):
            # If H is singular, roundoff can move λ out of its range: H⁺λ is then no minimum.
            inside &= problem.residual(column) <= _TOLERANCE
            clipped = problem.clip(column)
            x = torch.where(problem.improves(x, clipped)[:, None], clipped, x)
            outside = ~inside
            x[outside] = _minimise(problem.take(outside), x[outside])
            found.fill_(Rule.NNLS)
        x = torch.where(inside[:, None], column, x)
        found[inside] = Rule.COLUMN

    low, high = bounds or _NO_BOUNDS
    size = (x / c).clamp(low**power, high**power) ** (1 / power)
    factor = torch.where(free, 1.0, size / (norm * unit))  # (layers, 2r)
    found[free.all(-1)] = Rule.SKIPPED
    alpha, beta = factor.chunk(2, dim=-1)
    return Scales(alpha.contiguous(), beta.contiguous(), found)


def _check(
    scaling: float, eta_lipschitz: float, rule: str, bounds: tuple[float, float] | None
) -> None:
    if rule not in SCALING_RULES:
        raise ValueError(f"unknown scaling rule {rule!r}: choose one of {', '.join(SCALING_RULES)}")
    for name, value in (("scaling", scaling), ("eta_lipschitz", eta_lipschitz)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}: give a positive, finite number")
    if bounds is not None and not 0 < bounds[0] < bounds[1] < float("inf"):
        raise ValueError(f"scale bounds {bounds}: give 0 < low < high, such as (0.05, 5), or None")


def _equilibrate(
    gram_a: Tensor, gram_b: Tensor, unit: float, power: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The quadratic in the unknowns x (see Units).

    Each gram is scaled to a unit diagonal before the two are multiplied, to avoid over- and
    underflow.

    Returns:
        C (layers, 2r, 2r), and, (layers, 2r) each: c with maximum 1, the column norms of A and B,
        and the mask of the free unknowns.
    """
    r = gram_a.shape[-1] // 2
    grams = torch.stack((gram_a, gram_b)).double()  # (2, layers, 2r, 2r), a copy
    finite = grams.sum((0, 2, 3)).isfinite()  # (layers,)
    grams[:, ~finite] = 0.0  # all unknowns are free, so the layer is skipped
    square = _diagonal(grams).clone()  # (2, layers, 2r)
    norms = torch.where(square > _TINY, square, 0.0).sqrt()
    (norm_a, grad_a), (norm_b, grad_b) = (side.split(r, dim=-1) for side in norms)
    norm = torch.cat((norm_a, norm_b), dim=-1)
    gradient = torch.cat((grad_b, grad_a), dim=-1)  # crossed: ∇B = s·GᵀA belongs to α
    c = torch.where(norm * unit > _ZERO_SIZE, gradient / norm ** (power - 1), 0.0)
    c = c / c.amax(-1, keepdim=True).clamp_min(torch.finfo(c.dtype).tiny)
    known = c > _ZERO_GRADIENT

    inverse = square.clamp_min(_TINY).rsqrt()
    inverse[0] *= known  # zeroes the row and column of C of a free unknown
    corr, _ = quadratic(*grams.mul_(inverse[..., :, None]).mul_(inverse[..., None, :]))
    _diagonal(corr).fill_(1.0)
    return corr, torch.where(known, c, 0.0), norm, ~known


def _scalar(corr: Tensor, c: Tensor, norm: Tensor, power: int) -> Tensor:
    """Theorem 3: the best x (layers, 2r) with one α and one β, from 2 × 2 block sums of H, λ."""
    r = c.shape[-1] // 2
    side = (c * norm**power).view(-1, 2, r)  # (layers, 2, r): x if all z are equal
    side = side / side.amax(-1, keepdim=True).clamp_min(torch.finfo(c.dtype).tiny)
    basis = (side[..., None] * torch.eye(2).to(side)[:, None]).flatten(1, 2)  # (layers, 2r, 2)
    sums, lam = basis.mT @ corr @ basis, _apply(basis.mT, c)
    scale = _diagonal(sums)
    scale = torch.where(scale > 0, scale, 1.0).rsqrt()
    sums, lam = sums * scale[:, :, None] * scale[:, None, :], lam * scale
    t = _pinv_apply(sums, lam)  # (layers, 2)
    # A value that is not positive becomes 0; the other is then λ_k / H_kk, with H_kk = 1 here.
    positive = t > 0
    t = torch.where(positive.all(-1, keepdim=True), t, torch.where(positive, lam, 0.0))
    return _apply(basis, t * scale)


class _BoxProblem(NamedTuple):
    """Minimize xᵀCx − 2cᵀx over lower ≤ x ≤ upper, for C with a unit diagonal and any rank."""

    corr: Tensor  # (layers, n, n)
    c: Tensor  # (layers, n)
    lower: Tensor  # (layers, n)
    upper: Tensor  # (layers, n)

    def take(self, layers: Tensor) -> _BoxProblem:
        return _BoxProblem(*(field[layers] for field in self))

    def clip(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x, self.lower), self.upper)

    def gradient(self, x: Tensor) -> Tensor:
        """Half of the gradient: Cx − c. (layers, n)"""
        return _apply(self.corr, x) - self.c

    def residual(self, x: Tensor) -> Tensor:
        """max|x − clip(x − gradient)| / (max|c| + max|x|), zero only at minima. (layers,)"""
        moved = (x - self.clip(x - self.gradient(x))).abs().amax(-1)
        return moved / (self.c.amax(-1) + x.abs().amax(-1))

    def improves(self, x: Tensor, other: Tensor) -> Tensor:
        """Whether `other` is better than x, from a formula without cancellation. (layers,)"""
        return ((other - x) * (self.gradient(x) + self.gradient(other))).sum(-1) < 0


def _minimise(whole: _BoxProblem, start: Tensor) -> Tensor:
    """The minimum of a box problem; without convergence, a point no worse than `start`.

    A primal-dual interior-point method on all layers in parallel; converged layers are frozen.
    Active-set methods such as projected Newton take fewer steps on easy problems, but zigzag for
    hundreds of steps where columns are nearly parallel. This method takes 8 to 20 steps, seldom 30,
    at any rank.
    """
    problem = whole
    _, c, lower, upper = whole
    margin = 0.1 * torch.minimum(upper - lower, c)
    x = torch.minimum(torch.maximum(c, lower + margin), upper - margin)
    slack = torch.stack((x - lower, upper - x), dim=1)  # (layers, 2, n), own variable: may get tiny
    gap = torch.maximum(problem.gradient(x).abs() * c, 1e-3 * c.square()).mean(-1)
    dual = gap[:, None, None] / slack
    best, least = start.clone(), torch.full_like(gap, torch.inf)
    layers = torch.arange(len(start), device=start.device)  # not yet converged

    for step in range(_MAX_STEPS):
        at_lower, at_upper = (slack < dual).unbind(1)
        snapped = problem.clip(x.where(~at_upper, problem.upper).where(~at_lower, problem.lower))
        residual = problem.residual(snapped)
        better = residual < least[layers]
        best[layers[better]], least[layers[better]] = snapped[better], residual[better]
        todo = ~(residual <= _TOLERANCE)
        layers = layers[todo]
        if len(layers) == 0:
            break
        if not todo.all():
            problem, x, slack, dual = problem.take(todo), x[todo], slack[todo], dual[todo]
        x, slack, dual = _interior_step(problem, x, slack, dual, step < _CORRECTED_STEPS)

    failed = (least > _TOLERANCE) & whole.improves(best, start)
    return torch.where(failed[:, None], start, best)


def _interior_step(
    problem: _BoxProblem, x: Tensor, slack: Tensor, dual: Tensor, corrected: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One step towards gradient = dual_lower − dual_upper, slack·dual = 0, inside slack, dual > 0.

    Mehrotra's predictor-corrector (Nocedal & Wright, Numerical Optimization, algorithm 16.4).
    Its correction is fast but can cycle (Cartis 2009).

    Args:
        x: present point, (layers, n).
        slack: distances to the lower and the upper bound, (layers, 2, n).
        dual: multipliers of the lower and the upper bound, (layers, 2, n).
        corrected: whether to correct; otherwise the step only follows the central path.
    """
    sign = torch.tensor([[1.0], [-1.0]]).to(x)  # d slack / d x
    gradient = problem.gradient(x)
    newton = problem.corr.clone()
    _diagonal(newton).add_((dual / slack).sum(1) + _RIDGE)
    cholesky, _ = torch.linalg.cholesky_ex(newton)

    def direction(product: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Directions of x, slack and dual to slack·dual = product, to first order."""
        right = (sign * product / slack).sum(1) - gradient
        d_x = torch.cholesky_solve(right[..., None], cholesky).squeeze(-1)
        d_slack = sign * d_x[:, None]
        return d_x, d_slack, (product - dual * d_slack) / slack - dual

    def length(d_slack: Tensor, d_dual: Tensor, fraction: float) -> Tensor:
        """Step length: `fraction` of the way to the boundary, at most 1. (layers, 1, 1)"""
        rate = torch.maximum(-d_slack / slack, -d_dual / dual).amax((1, 2), keepdim=True)
        return fraction / rate.clamp_min(fraction)

    gap = (slack * dual).mean((1, 2), keepdim=True)
    if corrected:
        _, d_slack, d_dual = direction(0.0)
        t = length(d_slack, d_dual, 1.0)
        ahead = ((slack + t * d_slack) * (dual + t * d_dual)).mean((1, 2), keepdim=True)
        target = (ahead / gap) ** 3 * gap - d_slack * d_dual
    else:
        target = 0.1 * gap
    d_x, d_slack, d_dual = direction(target)
    t = length(d_slack, d_dual, 0.995)
    return x + t[:, 0] * d_x, slack + t * d_slack, dual + t * d_dual


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None]).squeeze(-1)


def _pinv_apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix⁺ vector, for PSD matrices with unit diagonal; rcond is n·ε, the roundoff of `eigh`."""
    values, vectors = torch.linalg.eigh(matrix)
    rcond = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    keep = values > rcond * values[..., -1:]
    inverse = torch.where(keep, values, torch.inf).reciprocal()
    return _apply(vectors, inverse * _apply(vectors.mT, vector))
