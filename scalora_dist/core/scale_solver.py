"""From grams to scales: how far to stretch each column of A and B at one ScaLoRA step.

With z = ηL s²·[α²; β²], the step of the scaled factors is nearest to full fine-tuning's where

    zᵀ H z − 2 λᵀ z,   z ≥ 0        (ScaLoRA, equation 10, appendix A.3)

is least: a convex quadratic in 2r unknowns per layer. All is float64, batched over layers that do
not influence one another, and needs no process group.

**Units.** λ_k / H_kk = 1/‖a_k‖², so an unknown left to itself gives its column the size
s·√(ηL)·α_k‖a_k‖ = 1. The unknowns used inside are x_k = √H_kk z_k. For them H becomes a matrix of
correlations C (unit diagonal) and λ becomes c_k = ‖∇b_k‖/‖a_k‖ (‖∇a_k‖/‖b_k‖ for β), while
x_k / c_k = z_k‖a_k‖² is the scaled column's size squared. So bounds on sizes are a box,
c·lo² ≤ x ≤ c·hi², and only ratios of gradients matter: loss scaling and clipping change nothing.

**Free unknowns.** Where a column of A is zero, or its partner's gradient is, the unknown has no
effect: its factor is 1 and it takes part in nothing. A start at A = 0 gives exact zeros; the first
three constants say what else is zero.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
from torch import Tensor

SCALING_RULES = ("paper", "scalar", "nnls")

# A squared norm under float32's smallest normal number squared: made of subnormals, digits lost.
_TINY = torch.finfo(torch.float32).tiny ** 2
# A column of A or B under 1e-12 of its natural size: α² stays finite in float32, as moments need.
_ZERO_SIZE = 1e-12
# A gradient c_k under 1e-12 of its layer's largest: nothing that _TOLERANCE could resolve.
_ZERO_GRADIENT = 1e-12

_NO_BOUNDS = (1e-6, 1e6)  # the sizes that bounds=None still keeps: no scale is zero or infinite
_TOLERANCE = 1e-12  # of the natural residual, relative to max|c| + max|x|
_RIDGE = 1e-13  # on Newton matrices' unit diagonal: bends the steps, does not move their end
_CORRECTED_STEPS, _MAX_STEPS = 15, 60


class Rule(enum.IntEnum):
    """How a layer's scales were found."""

    SKIPPED = 0
    COLUMN = 1
    SCALAR = 2
    NNLS = 3
    KEPT = 4  # near enough to 1 to be left as they are; not of `solve`


class Scales(NamedTuple):
    """The factors of A's and B's columns, and the rule that found each layer's."""

    alpha: Tensor  # (layers, r) float64
    beta: Tensor  # (layers, r) float64
    rule: Tensor  # (layers,) int64, values of Rule


def quadratic(gram_a: Tensor, gram_b: Tensor) -> tuple[Tensor, Tensor]:
    """H = (S_AᵀS_A) ∘ (S_BᵀS_B), S_A = [A, ∇A], S_B = [∇B, B], and λ (Theorem 5, by Lemma 7).

    Args:
        gram_a: [A, ∇A]ᵀ[A, ∇A], (layers, 2r, 2r).
        gram_b: [B, ∇B]ᵀ[B, ∇B], (layers, 2r, 2r); its halves are swapped here.

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
    bounds, else the scalar one (Theorem 3) clipped entry by entry. "scalar" always takes the
    latter. "nnls" solves the bounded problem exactly; it says COLUMN where Theorem 5 already did.

    Args:
        gram_a: as for `quadratic`. A layer whose grams are not finite, or that has no gradient,
            is SKIPPED with all factors 1; the other layers do not notice.
        gram_b: as for `quadratic`.
        scaling: s of y = W x + s·A(Bᵀx).
        eta_lipschitz: ηL; only this product enters.
        bounds: (lo, hi) for the sizes s·√(ηL)·‖column‖ of the scaled columns. None is the paper
            to the letter, except that sizes beyond [1e-6, 1e6] are clipped.
    """
    _check(scaling, eta_lipschitz, rule, bounds)
    low, high = (0.0, _NO_BOUNDS[1]) if bounds is None else bounds
    unit = scaling * eta_lipschitz**0.5
    corr, c, norm, free = _equilibrate(gram_a, gram_b, unit)
    # A free unknown is uncorrelated and has c = 0, hence x = 0; its box need only hold that.
    lower = (c * low**2).masked_fill(free, -1.0)
    upper = (c * high**2).masked_fill(free, 1.0)
    problem = _BoxProblem(corr, c, lower, upper)

    x = problem.clip(_scalar(corr, c, norm))
    found = torch.full(c.shape[:1], int(Rule.SCALAR), device=c.device)  # (layers,)
    if rule != "scalar":
        column = _pinv_apply(corr, c)
        # With bounds=None the paper asks for no more than positive.
        inside = (column > 0) if bounds is None else (column >= lower) & (column <= upper)
        inside = (inside | free).all(-1)  # (layers,)
        if rule == "nnls":
            # Should λ leave H's range (by roundoff, if H is singular), H⁺λ is not the minimum.
            inside &= problem.residual(column) <= _TOLERANCE
            clipped = problem.clip(column)
            x = torch.where(problem.improves(x, clipped)[:, None], clipped, x)
            outside = ~inside
            x[outside] = _minimise(problem.take(outside), x[outside])
            found.fill_(Rule.NNLS)
        x = torch.where(inside[:, None], column, x)
        found[inside] = Rule.COLUMN

    low, high = bounds or _NO_BOUNDS
    size = (x / c).clamp(low**2, high**2).sqrt()
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
    gram_a: Tensor, gram_b: Tensor, unit: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """C (layers, 2r, 2r), and c with maximum 1, A's and B's column norms, the free (layers, 2r).

    Each gram gets its unit diagonal before the two are multiplied, so nothing over- or underflows.
    """
    r = gram_a.shape[-1] // 2
    grams = torch.stack((gram_a, gram_b)).double()  # (2, layers, 2r, 2r), ours to change
    finite = grams.sum((0, 2, 3)).isfinite()  # (layers,)
    grams[:, ~finite] = 0.0  # all free, so skipped
    square = _diagonal(grams).clone()  # (2, layers, 2r)
    norms = torch.where(square > _TINY, square, 0.0).sqrt()
    (norm_a, grad_a), (norm_b, grad_b) = (side.split(r, dim=-1) for side in norms)
    norm = torch.cat((norm_a, norm_b), dim=-1)
    gradient = torch.cat((grad_b, grad_a), dim=-1)  # crossed: ∇B = s·GᵀA belongs to α
    c = torch.where(norm * unit > _ZERO_SIZE, gradient / norm, 0.0)
    c = c / c.amax(-1, keepdim=True).clamp_min(torch.finfo(c.dtype).tiny)
    known = c > _ZERO_GRADIENT

    inverse = square.clamp_min(_TINY).rsqrt()
    inverse[0] *= known  # the free lose their row and column of C
    corr, _ = quadratic(*grams.mul_(inverse[..., :, None]).mul_(inverse[..., None, :]))
    _diagonal(corr).fill_(1.0)
    return corr, torch.where(known, c, 0.0), norm, ~known


def _scalar(corr: Tensor, c: Tensor, norm: Tensor) -> Tensor:
    """Theorem 3: the best x with one α and one β, by the 2 × 2 block sums of H, λ. (layers, 2r)"""
    r = c.shape[-1] // 2
    side = (c * norm.square()).view(-1, 2, r)  # (layers, 2, r): x where z is the same throughout
    side = side / side.amax(-1, keepdim=True).clamp_min(torch.finfo(c.dtype).tiny)
    basis = (side[..., None] * torch.eye(2).to(side)[:, None]).flatten(1, 2)  # (layers, 2r, 2)
    sums, lam = basis.mT @ corr @ basis, _apply(basis.mT, c)
    scale = _diagonal(sums)
    scale = torch.where(scale > 0, scale, 1.0).rsqrt()
    sums, lam = sums * scale[:, :, None] * scale[:, None, :], lam * scale
    t = _pinv_apply(sums, lam)  # (layers, 2)
    # One that is not positive becomes 0 and leaves the other λ_k / H_kk; H_kk = 1 here.
    positive = t > 0
    t = torch.where(positive.all(-1, keepdim=True), t, torch.where(positive, lam, 0.0))
    return _apply(basis, t * scale)


class _BoxProblem(NamedTuple):
    """min xᵀCx − 2cᵀx over lower ≤ x ≤ upper, for C with a unit diagonal and of any rank."""

    corr: Tensor  # (layers, n, n)
    c: Tensor  # (layers, n)
    lower: Tensor  # (layers, n)
    upper: Tensor  # (layers, n)

    def take(self, layers: Tensor) -> _BoxProblem:
        return _BoxProblem(*(field[layers] for field in self))

    def clip(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x, self.lower), self.upper)

    def gradient(self, x: Tensor) -> Tensor:
        """Half of it."""
        return _apply(self.corr, x) - self.c

    def residual(self, x: Tensor) -> Tensor:
        """max|x − clip(x − gradient)|, zero at minima only, over max|c| + max|x|. (layers,)"""
        moved = (x - self.clip(x - self.gradient(x))).abs().amax(-1)
        return moved / (self.c.amax(-1) + x.abs().amax(-1))

    def improves(self, x: Tensor, other: Tensor) -> Tensor:
        """Where `other` is better than x, by the difference itself: no cancellation. (layers,)"""
        return ((other - x) * (self.gradient(x) + self.gradient(other))).sum(-1) < 0


def _minimise(whole: _BoxProblem, start: Tensor) -> Tensor:
    """The minimum of a box problem, or, should it not converge, nothing worse than `start`.

    A primal-dual interior point method, all layers abreast, each frozen when it has converged.
    Active-set methods such as projected Newton take fewer steps on easy problems but zigzag for
    hundreds where columns are nearly parallel; this takes 8 to 20, seldom 30, whatever the rank.
    """
    problem = whole
    _, c, lower, upper = whole
    margin = 0.1 * torch.minimum(upper - lower, c)
    x = torch.minimum(torch.maximum(c, lower + margin), upper - margin)
    slack = torch.stack((x - lower, upper - x), dim=1)  # (layers, 2, n), kept apart: may get tiny
    gap = torch.maximum(problem.gradient(x).abs() * c, 1e-3 * c.square()).mean(-1)
    dual = gap[:, None, None] / slack
    best, least = start.clone(), torch.full_like(gap, torch.inf)
    layers = torch.arange(len(start), device=start.device)  # at work

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
    Its correction is fast but can cycle (Cartis 2009), so without `corrected` the step follows
    the central path plainly. x (layers, n); slack and dual (layers, 2, n), lower side then upper.
    """
    sign = torch.tensor([[1.0], [-1.0]]).to(x)  # d slack / d x
    gradient = problem.gradient(x)
    newton = problem.corr.clone()
    _diagonal(newton).add_((dual / slack).sum(1) + _RIDGE)
    cholesky, _ = torch.linalg.cholesky_ex(newton)

    def direction(product: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Of x, slack and dual, towards slack·dual = product to first order."""
        right = (sign * product / slack).sum(1) - gradient
        d_x = torch.cholesky_solve(right[..., None], cholesky).squeeze(-1)
        d_slack = sign * d_x[:, None]
        return d_x, d_slack, (product - dual * d_slack) / slack - dual

    def length(d_slack: Tensor, d_dual: Tensor, fraction: float) -> Tensor:
        """The longest step up to 1 that covers `fraction` of the way out. (layers, 1, 1)"""
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
    """matrix⁺ vector, for PSD matrices of unit diagonal; rcond is n·ε, the roundoff of `eigh`."""
    values, vectors = torch.linalg.eigh(matrix)
    rcond = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    keep = values > rcond * values[..., -1:]
    inverse = torch.where(keep, values, torch.inf).reciprocal()
    return _apply(vectors, inverse * _apply(vectors.mT, vector))
