"""Reference of ScaLoRA: dense float64, from the formulas. The sharded code must agree with it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

Array = NDArray[np.float64]


@dataclass(frozen=True)
class State:
    """One layer, full: W (m, n), A (m, r), B (n, r). Gradients and moments have factors' shapes."""

    W: Array
    A: Array
    B: Array
    grad_A: Array
    grad_B: Array
    m_A: Array
    v_A: Array
    m_B: Array
    v_B: Array

    def largest_error(self, other: State, names: tuple[str, ...] = ()) -> float:
        """The largest relative error (Frobenius norm) of ``other`` from ``self`` in any field.

        Args:
            other: the state to compare.
            names: fields to compare; (): all.
        """
        names = names or tuple(field.name for field in fields(self))
        return max(relative_error(getattr(other, name), getattr(self, name)) for name in names)


def relative_error(value: Array, true: Array) -> float:
    norm = float(np.linalg.norm(true))
    error = float(np.linalg.norm(np.asarray(value, dtype=np.float64) - true))
    return error / norm if norm else error


def factor_gradients(G: Array, A: Array, B: Array, s: float) -> tuple[Array, Array]:
    """∇A = s·G B and ∇B = s·Gᵀ A."""
    return s * G @ B, s * G.T @ A


def scales(
    G: Array, A: Array, B: Array, s: float, eta_lipschitz: float, bounds: tuple[float, float] | None
) -> tuple[Array, Array, str]:
    """α (r,), β (r,) and the rule's name, by the paper's rule, from the dense m × n problem.

    Grams are not used. Minimises ‖G − Σ_k z_k T_k‖² over z = ηL s² [α²; β²], where T_k are the
    terms a_k (Gᵀa_k)ᵀ and (G b_k) b_kᵀ. A side without a gradient is free: its factors are 1.
    """
    r = A.shape[1]
    terms = [np.outer(A[:, k], G.T @ A[:, k]) for k in range(r)]
    terms += [np.outer(G @ B[:, k], B[:, k]) for k in range(r)]
    T = np.stack([term.ravel() for term in terms], axis=1)
    used = np.linalg.norm(T, axis=0) > 0
    low, high = bounds or (0.0, np.inf)
    norms = np.concatenate([np.linalg.norm(A, axis=0), np.linalg.norm(B, axis=0)])
    box = [(bound / np.where(used, norms, 1.0)) ** 2 for bound in (low, high)]
    z, *_ = np.linalg.lstsq(T[:, used], G.ravel(), rcond=None)
    rule = "column"
    if (z <= 0).any() or (z < box[0][used]).any() or (z > box[1][used]).any():
        rule = "scalar"
        both = np.stack([T[:, :r].sum(1), T[:, r:].sum(1)], axis=1)
        sides = np.linalg.norm(both, axis=0) > 0
        pair = np.zeros(2)
        pair[sides], *_ = np.linalg.lstsq(both[:, sides], G.ravel(), rcond=None)
        if (pair[sides] <= 0).any():
            alone = both.T @ G.ravel() / np.maximum((both**2).sum(0), 1e-300)
            pair = np.where(pair > 0, alone, 0.0)
        z = np.clip(np.repeat(pair, r), *box)[used]
    factor = np.ones(2 * r)
    factor[used] = np.sqrt(z / eta_lipschitz) / s
    return factor[:r], factor[r:], rule


def adamw_scales(
    state: State,
    s: float,
    eta_lipschitz: float,
    bounds: tuple[float, float],
    *,
    step: int,
    clip: float,
    epsilon: float = 1e-8,
) -> tuple[Array, Array]:
    """α (r,) and β (r,) of the rule "adamw", from the dense m × n terms of AdamW's step ``step``.

    Minimises ‖Σ_k x_k T_k‖² − 2 Σ_k λ_k x_k over x = s·√(ηL)·[α; β], where T_k are a_k n_bkᵀ and
    n_ak b_kᵀ, and λ_k = ‖a_k‖‖n_bk‖² and ‖b_k‖‖n_ak‖².
    """
    zero = np.zeros_like
    A, B = state.A, state.B
    how: dict[str, Any] = {"step": step, "lr": 1.0, "clip": clip, "epsilon": epsilon}
    N_A = -adamw(zero(A), state.grad_A, state.m_A, state.v_A, **how)
    N_B = -adamw(zero(B), state.grad_B, state.m_B, state.v_B, **how)
    r = A.shape[1]
    terms = [np.outer(A[:, k], N_B[:, k]) for k in range(r)]
    terms += [np.outer(N_A[:, k], B[:, k]) for k in range(r)]
    T = np.stack([term.ravel() for term in terms], axis=1)
    norms = np.concatenate([np.linalg.norm(A, axis=0), np.linalg.norm(B, axis=0)])
    steps = np.concatenate([np.linalg.norm(N_B, axis=0), np.linalg.norm(N_A, axis=0)])
    used = norms * steps > 0
    # ‖R x‖² − 2λᵀx = ‖R x − R⁻ᵀλ‖² + constant, with TᵀT = RᵀR.
    _, R = np.linalg.qr(T[:, used])
    right = np.linalg.solve(R.T, (norms * steps**2)[used])
    box = tuple(bound / norms[used] for bound in bounds)
    factor = np.ones(2 * r)
    x = lsq_linear(R, right, box, method="bvls", tol=1e-15).x
    factor[used] = x / (s * np.sqrt(eta_lipschitz))
    return factor[:r], factor[r:]


def transform(state: State, alpha: Array, beta: Array, s: float) -> State:
    """The ScaLoRA transform. The layer's function does not change; gradients and moments follow."""
    return replace(
        state,
        W=state.W + s * (state.A * (1 - alpha * beta)) @ state.B.T,
        A=state.A * alpha,
        B=state.B * beta,
        grad_A=state.grad_A * beta,
        grad_B=state.grad_B * alpha,
        m_A=state.m_A * beta,
        v_A=state.v_A * beta**2,
        m_B=state.m_B * alpha,
        v_B=state.v_B * alpha**2,
    )


def adamw(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    *,
    step: int,
    lr: float,
    clip: float = 1.0,
    epsilon: float = 1e-8,
) -> Array:
    """The parameter after AdamW's step ``step`` (from 1) with gradient ``clip · g``, no decay."""
    m = 0.9 * m + 0.1 * clip * g
    v = 0.999 * v + 0.001 * (clip * g) ** 2
    return p - lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + epsilon)
