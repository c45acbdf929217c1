"""Reference of ScaLoRA: dense float64, from the formulas. The sharded code must agree with it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

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
    p: Array, g: Array, m: Array, v: Array, *, step: int, lr: float, clip: float = 1.0
) -> Array:
    """The parameter after AdamW's step ``step`` (from 1) with gradient ``clip · g``, no decay."""
    m = 0.9 * m + 0.1 * clip * g
    v = 0.999 * v + 0.001 * (clip * g) ** 2
    return p - lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
