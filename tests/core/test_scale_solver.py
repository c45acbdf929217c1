"""The scales' solve against brute force, KKT conditions, scipy and its own invariances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from scipy import optimize
from torch import Tensor

from scalora_dist.core import scale_solver as module
from scalora_dist.core.scale_solver import SCALING_RULES, Rule, Scales, quadratic, solve

DTYPE = torch.float64
BOUNDS = (0.05, 5.0)
ETA_L, SCALING = 0.5, 2.0


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=DTYPE)


def factors(layers: int, r: int, seed: int, mix: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """A, B, G with a low-rank G that A and B overlap with: both column and fallback layers."""
    draw, rows, cols = randn(seed), 3 * r + 5, 2 * r + 9
    grad = draw(layers, rows, 3) @ draw(layers, 3, cols) + 0.3 * draw(layers, rows, cols)
    a = draw(layers, rows, r) + mix * grad @ draw(layers, cols, r) / cols
    b = draw(layers, cols, r) + mix * grad.mT @ draw(layers, rows, r) / rows
    return a, b, grad


def grams(a: Tensor, b: Tensor, grad: Tensor, scaling: float = SCALING) -> tuple[Tensor, Tensor]:
    side_a = torch.cat((a, scaling * grad @ b), dim=-1)
    side_b = torch.cat((b, scaling * grad.mT @ a), dim=-1)
    return side_a.mT @ side_a, side_b.mT @ side_b


def run(
    gram_a: Tensor,
    gram_b: Tensor,
    rule: str,
    bounds: tuple[float, float] | None = BOUNDS,
    **changes: Any,
) -> Scales:
    options = {"scaling": SCALING, "eta_lipschitz": ETA_L} | changes
    return solve(gram_a, gram_b, rule=rule, bounds=bounds, **options)


def distance(a: Tensor, b: Tensor, grad: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """‖G − ηL s²(G B diag(β²) Bᵀ + A diag(α²) Aᵀ G)‖² by hand, over ‖G‖². (layers,)"""
    step = grad @ (b * beta[:, None] ** 2) @ b.mT + (a * alpha[:, None] ** 2) @ a.mT @ grad
    rest = grad - ETA_L * SCALING**2 * step
    return rest.square().sum((1, 2)) / grad.square().sum((1, 2))


def sizes(scales: Scales, a: Tensor, b: Tensor) -> Tensor:
    factor, norm = (
        torch.cat((scales.alpha, scales.beta), -1),
        torch.cat((a.norm(dim=1), b.norm(dim=1)), -1),
    )
    return SCALING * ETA_L**0.5 * factor * norm


# --- the quadratic -------------------------------------------------------------------------------


def test_quadratic_is_the_distance() -> None:
    a, b, grad = factors(4, 3, seed=0)
    hess, lam = quadratic(*grams(a, b, grad))
    assert hess.shape == (4, 6, 6) and lam.shape == (4, 6)
    draw = randn(1)
    for _ in range(5):
        alpha, beta = draw(4, 3), draw(4, 3)
        z = ETA_L * SCALING**2 * torch.cat((alpha, beta), -1) ** 2
        form = torch.einsum("li,lij,lj->l", z, hess, z) - 2 * (lam * z).sum(-1)
        expected = 1 + form / (SCALING**2 * grad.square().sum((1, 2)))
        torch.testing.assert_close(expected, distance(a, b, grad, alpha, beta), rtol=1e-11, atol=0)


def test_nothing_beats_the_solution() -> None:
    """Random perturbations of every size, inside the same bounds, never come nearer."""
    a, b, grad = factors(60, 4, seed=2)
    gram_a, gram_b = grams(a, b, grad)
    draw = randn(3)
    for bounds in (BOUNDS, (0.5, 1.5), None):
        low, high = bounds or (0.0, 1e6)
        found = run(gram_a, gram_b, "nnls", bounds)
        assert (found.rule == Rule.COLUMN).any() and (found.rule == Rule.NNLS).any()
        least = distance(a, b, grad, found.alpha, found.beta)
        size = sizes(found, a, b)
        norm = size / torch.cat((found.alpha, found.beta), -1)
        for k in range(60):
            spread = 10.0 ** -(k % 6)
            tried = (size + spread * draw(*size.shape) * (torch.rand_like(size) < 0.4)).clamp(
                low, high
            )
            alpha, beta = (tried / norm).chunk(2, -1)
            assert (distance(a, b, grad, alpha, beta) >= least - 1e-12).all()


def test_nothing_beats_the_solution_for_adamw() -> None:
    """The same for AdamW's step, whose directions N are any matrices."""
    draw = randn(20)
    a, b, n_a, n_b = draw(40, 17, 4), draw(40, 13, 4), draw(40, 17, 4), draw(40, 13, 4)
    n_a, n_b = n_a - a, n_b - b + 2 * n_b[..., :1]  # correlated with each other and with A and B
    gram_a, gram_b = (x.mT @ x for x in (torch.cat((a, n_a), -1), torch.cat((b, n_b), -1)))
    unit = SCALING * ETA_L**0.5

    def distance(alpha: Tensor, beta: Tensor) -> Tensor:
        """‖D‖² − 2⟨N_W, D⟩, by hand, for the step D and N_W b = ‖b‖ n_a, N_Wᵀ a = ‖a‖ n_b."""
        step = unit * (n_a * beta[:, None] @ b.mT + a * alpha[:, None] @ n_b.mT)
        along = alpha * a.norm(dim=1) * n_b.square().sum(1)
        along += beta * b.norm(dim=1) * n_a.square().sum(1)
        return step.square().sum((1, 2)) - 2 * unit * along.sum(-1)

    for bounds in (BOUNDS, (0.5, 1.5)):
        found = run(gram_a, gram_b, "adamw", bounds)
        assert (found.rule == Rule.COLUMN).any() and (found.rule == Rule.NNLS).any()
        least = distance(found.alpha, found.beta)
        size = sizes(found, a, b)
        norm = size / torch.cat((found.alpha, found.beta), -1)
        for k in range(60):
            moves = 10.0 ** -(k % 6) * draw(*size.shape) * (torch.rand_like(size) < 0.4)
            alpha, beta = ((size + moves).clamp(*bounds) / norm).chunk(2, -1)
            assert (distance(alpha, beta) >= least - 1e-11 * least.abs()).all()


def test_paper_takes_theorem_5_where_it_holds() -> None:
    a, b, grad = factors(60, 4, seed=2)
    gram_a, gram_b = grams(a, b, grad)
    hess, lam = quadratic(gram_a, gram_b)
    z = torch.linalg.solve(hess, lam)
    positive = (z > 0).all(-1)
    assert 0 < positive.sum() < 60
    found = run(gram_a, gram_b, "paper", None)
    assert torch.equal(found.rule == Rule.COLUMN, positive)
    assert torch.equal(found.rule == Rule.SCALAR, ~positive)
    expected = (z / ETA_L).sqrt() / SCALING
    torch.testing.assert_close(
        torch.cat((found.alpha, found.beta), -1)[positive], expected[positive], rtol=1e-7, atol=0
    )
    exact, scalar = run(gram_a, gram_b, "nnls", None), run(gram_a, gram_b, "scalar", None)
    assert torch.equal(exact.rule == Rule.COLUMN, positive)
    assert torch.equal(exact.alpha[positive], found.alpha[positive])
    assert torch.equal(found.alpha[~positive], scalar.alpha[~positive])


def test_scalar_is_the_best_pair() -> None:
    a, b, grad = factors(40, 4, seed=4)
    a[:10] = grad[:10] @ b[:10]  # makes one of the two unknowns drop out in some layers
    found = run(*grams(a, b, grad), "scalar", None)
    assert (found.rule == Rule.SCALAR).all()
    least = distance(a, b, grad, found.alpha, found.beta)
    for factor in (found.alpha, found.beta):
        dropped = sizes(found, a, b)[:, :4].amin(-1) <= 1.01e-6
        kept = factor[~dropped]
        torch.testing.assert_close(kept, kept[:, :1].expand_as(kept), rtol=1e-12, atol=0)
    for up in torch.logspace(-2, 2, 41, dtype=DTYPE):
        for down in (0.0, 0.5, 0.99, 1.0, 1.01, 2.0):
            alpha, beta = found.alpha[:, :1].expand(-1, 4), found.beta[:, :1].expand(-1, 4)
            for pair in ((up * alpha, down * beta), (down * alpha, up * beta)):
                assert (distance(a, b, grad, *pair) >= least - 1e-9).all()


def test_scalar_with_one_unknown_dropped() -> None:
    """Theorem 3's boundary case, by the block sums of H and λ."""
    draw = randn(5)
    a, b, grad_a, grad_b = draw(200, 6, 2), draw(200, 5, 2), draw(200, 6, 2), draw(200, 5, 2)
    grad_a, grad_b = a + 0.3 * grad_a, draw(200, 1, 1) * b + 0.3 * grad_b  # terms nearly coincide
    side_a, side_b = torch.cat((a, grad_a), -1), torch.cat((b, grad_b), -1)
    gram_a, gram_b = side_a.mT @ side_a, side_b.mT @ side_b
    hess, lam = quadratic(gram_a, gram_b)
    hess, lam = hess.view(200, 2, 2, 2, 2).sum((2, 4)), lam.view(200, 2, 2).sum(2)
    z = torch.linalg.solve(hess, lam)
    dropped = (z <= 0).any(-1, keepdim=True)
    assert 10 < dropped.sum() < 190
    alone = torch.where(z <= 0, 0.0, lam / hess.diagonal(dim1=1, dim2=2))
    z = torch.where(dropped, alone, z).repeat_interleave(2, dim=-1)
    found = run(gram_a, gram_b, "scalar", None)
    expected = (z / ETA_L).sqrt() / SCALING
    both = torch.cat((found.alpha, found.beta), -1)
    torch.testing.assert_close(both, expected, rtol=1e-8, atol=1e-5)


# --- the box problem -----------------------------------------------------------------------------


def box_problem(kind: str, layers: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """C with unit diagonal and c in its range, c > 0 with maximum 1."""
    draw = randn(seed)
    if kind == "well":
        root = draw(layers, 2 * n, n)
    elif kind == "rank-deficient":
        root = draw(layers, max(1, n // 3), n)
    elif kind == "duplicates":
        root = draw(layers, n, n // 2).repeat(1, 1, 2)
    elif kind == "cond-1e12":
        left, right = (torch.linalg.qr(draw(layers, n, n))[0] for _ in range(2))
        root = left * torch.logspace(0, -6, n, dtype=DTYPE) @ right.mT
    else:  # "parallel", all columns
        root = draw(layers, n, 1) + 3e-6 * draw(layers, n, n)
    root = root / root.norm(dim=1, keepdim=True)
    c = root.mT @ draw(layers, root.shape[1], 1)
    root = root * c.sign().mT
    corr, c = root.mT @ root, c.squeeze(-1).abs()
    return corr, c / c.amax(-1, keepdim=True)


KINDS = ("well", "rank-deficient", "duplicates", "cond-1e12", "parallel")
BOXES = ((0.0025, 25.0), (0.25, 4.0), (0.0, 1e12), (1.5, 1.6))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layers", "n"), [(200, 2), (200, 6), (200, 16), (30, 64), (6, 128)])
def test_minimum_meets_kkt(kind: str, layers: int, n: int) -> None:
    corr, c = box_problem(kind, layers, n, seed=n)
    if kind in ("cond-1e12", "parallel") and n > 2:
        assert torch.linalg.cond(corr).median() > 1e9
    for low, high in BOXES:
        problem = module._BoxProblem(corr, c, low * c, high * c)
        start = problem.clip(c)
        x = module._minimise(problem, start)
        assert (x >= problem.lower).all() and (x <= problem.upper).all()
        gradient = (corr @ x[..., None]).squeeze(-1) - c
        scale = 1e-8 * x.abs().amax(-1, keepdim=True).clamp_min(1)
        # The gradient may push x only against a bound that x is at.
        assert (gradient <= scale)[x - problem.lower > scale].all()
        assert (gradient >= -scale)[problem.upper - x > scale].all()
        assert (problem.residual(x) <= 1e-11).all()
        gain = ((start - x) * (gradient + problem.gradient(start))).sum(-1)
        assert (gain >= -1e-12).all()


@pytest.mark.parametrize("n", [6, 16])
def test_minimum_agrees_with_scipy(n: int) -> None:
    corr, c = box_problem("well", 20, n, seed=7)
    root = torch.linalg.cholesky(corr)
    right = torch.linalg.solve_triangular(root, c[..., None], upper=False).squeeze(-1)
    for low, high in BOXES:
        x = module._minimise(module._BoxProblem(corr, c, low * c, high * c), c.clone())
        for layer in range(len(c)):
            matrix, vector = root[layer].mT.numpy(), right[layer].numpy()
            if low == 0:
                expected = optimize.nnls(matrix, vector)[0]
            else:
                box = (low * c[layer].numpy(), high * c[layer].numpy())
                expected = optimize.lsq_linear(matrix, vector, box, method="bvls", tol=1e-14).x
            torch.testing.assert_close(x[layer], torch.from_numpy(expected), rtol=1e-7, atol=1e-8)


def test_unconverged_minimum_is_never_worse_than_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    corr, c = box_problem("cond-1e12", 50, 16, seed=8)
    problem = module._BoxProblem(corr, c, 0.0025 * c, 25 * c)
    start = module._minimise(problem, problem.clip(c))
    monkeypatch.setattr(module, "_MAX_STEPS", 1)
    assert not problem.improves(module._minimise(problem, start), start).any()


@pytest.mark.parametrize("kind", KINDS)
def test_pseudo_inverse_keeps_all_that_is_not_roundoff(kind: str) -> None:
    corr, c = box_problem(kind, 50, 16, seed=9)
    x = module._pinv_apply(corr, c)
    left = (corr @ x[..., None]).squeeze(-1) - c
    assert (left.abs().amax(-1) <= 1e-8 * (1 + x.abs().amax(-1))).all()


def ill_grams(layers: int, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """Nearly equal columns in half of the layers, parallel ones in the others; of any size."""
    a, b, grad = factors(layers, r, seed)
    draw, half = randn(seed + 1), layers // 2
    for side in (a, b):
        side[:half] = side[:half, :, :1] + 1e-6 * draw(half, *side.shape[1:])
        side[half:] = side[half:, :, :1] * draw(layers - half, 1, r)
        side *= 10 ** (2 * draw(layers, 1, r)).clamp(-4, 4)
    return grams(a, b, grad)


@pytest.mark.parametrize("bounds", [BOUNDS, (0.5, 2.0), None])
@pytest.mark.parametrize("ill", [False, True])
def test_nnls_is_never_worse_and_meets_kkt(bounds: tuple[float, float] | None, ill: bool) -> None:
    gram_a, gram_b = ill_grams(60, 8, 9) if ill else grams(*factors(60, 8, seed=9))
    square = torch.cat([gram.diagonal(dim1=1, dim2=2)[:, :8] for gram in (gram_a, gram_b)], -1)
    hess, lam = quadratic(gram_a, gram_b)
    scale = hess.diagonal(dim1=1, dim2=2).rsqrt()
    corr, c = hess * scale[:, :, None] * scale[:, None], lam * scale
    top = c.amax(-1, keepdim=True)
    low, high = bounds or (0.0, 1e6)
    problem = module._BoxProblem(corr, c / top, c / top * low**2, c / top * high**2)

    def unknowns(scales: Scales) -> Tensor:
        z = ETA_L * SCALING**2 * torch.cat((scales.alpha, scales.beta), -1) ** 2
        return z * square * c / top

    x = unknowns(run(gram_a, gram_b, "nnls", bounds))
    assert (problem.residual(x) <= 1e-8).all()
    column = problem.clip(module._pinv_apply(problem.corr, problem.c))
    others = [unknowns(run(gram_a, gram_b, rule, bounds)) for rule in ("paper", "scalar")]
    for other in (*others, column):
        gain = ((other - x) * (problem.gradient(x) + problem.gradient(other))).sum(-1)
        assert (gain >= -1e-11).all()


# --- invariances, starts, bounds -----------------------------------------------------------------


@pytest.mark.parametrize("rule", SCALING_RULES)
@pytest.mark.parametrize("factor", [1e-25, 1e-6, 65536.0, 1e60])
def test_gradients_common_factor_does_not_matter(rule: str, factor: float) -> None:
    gram_a, gram_b = grams(*factors(30, 4, seed=10))
    one = torch.ones(8, dtype=DTYPE)
    one[4:] = factor
    weight = one[:, None] * one
    for bounds in (BOUNDS, None):
        found, other = (
            run(gram_a, gram_b, rule, bounds),
            run(gram_a * weight, gram_b * weight, rule, bounds),
        )
        assert torch.equal(found.rule, other.rule)
        torch.testing.assert_close(found.alpha, other.alpha, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.beta, other.beta, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rule", SCALING_RULES)
def test_eta_lipschitz_scales_by_its_root(rule: str) -> None:
    gram_a, gram_b = grams(*factors(30, 4, seed=11))
    found, other = run(gram_a, gram_b, rule), run(gram_a, gram_b, rule, eta_lipschitz=ETA_L * 9)
    torch.testing.assert_close(found.alpha, 3 * other.alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.beta, 3 * other.beta, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", SCALING_RULES)
@pytest.mark.parametrize("bounds", [BOUNDS, None])
def test_start_at_zero(rule: str, bounds: tuple[float, float] | None) -> None:
    a, b, grad = factors(10, 4, seed=12)
    a.zero_()
    found = run(*grams(a, b, grad), rule, bounds)
    assert torch.equal(found.alpha, torch.ones_like(found.alpha))
    low, high = bounds or (1e-6, 1e6)
    size = sizes(found, a, b)[:, 4:]
    assert (size >= low * (1 - 1e-12)).all() and (size <= high * (1 + 1e-12)).all()
    assert (found.rule != Rule.SKIPPED).all()
    # B alone: G B diag(β²)Bᵀ is all there is.
    if rule == "scalar" and bounds is None:
        assert (found.beta - found.beta[:, :1]).abs().max() < 1e-12


@pytest.mark.parametrize("rule", SCALING_RULES)
def test_nothing_to_do_is_skipped(rule: str) -> None:
    a, b, grad = factors(3, 4, seed=13)
    grad[0] = 0
    grad[1] = 1e-42  # float32 subnormals
    found = run(*grams(a, b, grad), rule)
    assert found.rule[:2].tolist() == [Rule.SKIPPED] * 2 and found.rule[2] != Rule.SKIPPED
    assert (found.alpha[:2] == 1).all() and (found.beta[:2] == 1).all()
    empty = run(torch.zeros(0, 8, 8), torch.zeros(0, 8, 8), rule)
    assert empty.alpha.shape == (0, 4) and empty.rule.shape == (0,)


@pytest.mark.parametrize("rule", SCALING_RULES)
@pytest.mark.parametrize("tiny", [0.0, 1e-40, 1e-14])
def test_zero_column_is_left_out(rule: str, tiny: float) -> None:
    """One dead column of A changes nothing for the others but by its own absence."""
    a, b, grad = factors(30, 4, seed=14)
    a[:, :, 2] *= tiny
    found = run(*grams(a, b, grad), rule)
    assert (found.alpha[:, 2] == 1).all()
    # The same with that unknown cut out of the problem by hand: its gradient zeroed instead.
    gram_a, gram_b = grams(a, b, grad)
    gram_b[:, 6] = gram_b[:, :, 6] = 0
    other = run(gram_a, gram_b, rule)
    torch.testing.assert_close(found.alpha, other.alpha, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.beta, other.beta, rtol=1e-9, atol=0)
    assert ((other.rule == Rule.COLUMN) == (found.rule == Rule.COLUMN)).all()


@pytest.mark.parametrize("rule", SCALING_RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_layer_stays_alone(rule: str, bad: float) -> None:
    gram_a, gram_b = grams(*factors(20, 4, seed=15))
    found = run(gram_a, gram_b, rule)
    gram_a[3, 1, 2], gram_b[7, 5, 5] = bad, bad
    other = run(gram_a, gram_b, rule)
    good = torch.ones(20, dtype=torch.bool)
    good[[3, 7]] = False
    assert (other.rule[~good] == Rule.SKIPPED).all()
    assert (other.alpha[~good] == 1).all() and (other.beta[~good] == 1).all()
    for before, after in zip(found, other, strict=True):
        assert torch.equal(before[good], after[good])


@pytest.mark.parametrize("rule", SCALING_RULES)
@pytest.mark.parametrize("r", [1, 3, 8])
def test_batch_equals_one_by_one(rule: str, r: int) -> None:
    gram_a, gram_b = grams(*factors(40, r, seed=16))
    found = run(gram_a, gram_b, rule)
    for layer in range(40):
        alone = run(gram_a[layer : layer + 1], gram_b[layer : layer + 1], rule)
        assert alone.rule[0] == found.rule[layer]
        torch.testing.assert_close(alone.alpha[0], found.alpha[layer], rtol=1e-10, atol=0)
        torch.testing.assert_close(alone.beta[0], found.beta[layer], rtol=1e-10, atol=0)


@pytest.mark.parametrize("rule", SCALING_RULES)
@pytest.mark.parametrize("bounds", [BOUNDS, (0.5, 2.0), (2.0, 3.0), None])
def test_sizes_stay_within_bounds(rule: str, bounds: tuple[float, float] | None) -> None:
    low, high = bounds or (1e-6, 1e6)
    for gram_a, gram_b in (grams(*factors(60, 4, seed=17)), ill_grams(60, 4, 18)):
        found = run(gram_a, gram_b, rule, bounds)
        norm = torch.stack((gram_a, gram_b)).diagonal(dim1=2, dim2=3)[..., :4].sqrt()
        size = SCALING * ETA_L**0.5 * torch.stack((found.alpha, found.beta)) * norm
        assert size.isfinite().all() and (size > 0).all()
        assert (size >= low * (1 - 1e-12)).all() and (size <= high * (1 + 1e-12)).all()
        assert (found.rule != Rule.SKIPPED).all()


def test_extreme_scales_do_not_overflow() -> None:
    gram_a, gram_b = grams(*factors(20, 4, seed=19))
    weight = torch.logspace(-30, 140, 4, dtype=DTYPE).repeat_interleave(2)
    weight = weight[:, None] * weight
    for rule in SCALING_RULES:
        for bounds in (BOUNDS, None):
            found = run(gram_a * weight, gram_b * weight, rule, bounds)
            assert found.alpha.isfinite().all() and (found.alpha > 0).all()
            assert found.beta.isfinite().all() and (found.beta > 0).all()
            assert found.alpha.max() <= 1e18  # its square still fits float32


@pytest.mark.parametrize("bounds", [BOUNDS, None])
def test_lambda_outside_the_range_of_h(bounds: tuple[float, float] | None) -> None:
    """Rounded gradients of equal columns differ, so zᵀHz − 2λᵀz has no minimum without bounds."""
    a, b, grad = factors(40, 6, seed=20)
    a[:, :, 1] = a[:, :, 0]
    gram_a, gram_b = grams(a, b, grad)
    weight = torch.ones(12, dtype=DTYPE)
    weight[7] = 1.01  # the gradient of B's column 1
    gram_b = gram_b * weight[:, None] * weight
    low, high = bounds or (1e-6, 1e6)
    for rule in SCALING_RULES:
        size = sizes(run(gram_a, gram_b, rule, bounds), a, b)
        assert (size >= low * (1 - 1e-12)).all() and (size <= high * (1 + 1e-12)).all()
    found = run(gram_a, gram_b, "nnls", bounds)
    assert (found.rule == Rule.NNLS).all()
    # The minimum prefers the one with the larger gradient until a bound stops the exchange.
    size = sizes(found, a, b)
    assert ((size[:, 0] < low * 1.001) | (size[:, 1] > high * 0.999)).all()


def test_settings_that_make_no_sense_say_so() -> None:
    gram_a, gram_b = grams(*factors(1, 2, seed=22))
    with pytest.raises(ValueError, match="choose one of paper, scalar, nnls"):
        run(gram_a, gram_b, "columns")
    for bounds in ((0.0, 5.0), (2.0, 1.0), (0.1, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="0 < low < high"):
            run(gram_a, gram_b, "nnls", bounds)
    for name in ("scaling", "eta_lipschitz"):
        with pytest.raises(ValueError, match=name):
            run(gram_a, gram_b, "nnls", BOUNDS, **{name: 0.0})
