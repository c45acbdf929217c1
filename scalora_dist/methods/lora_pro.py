"""LoRA-Pro (arXiv 2407.18242): replaces ∇A and ∇B so that the step is closest to full fine-tuning.

A step of A and B moves the weight by ``s·(dA Bᵀ + A dBᵀ)``. Least squares against the gradient of W
gives dA and dB in closed form from the factors and their gradients (Theorem 2.1). One matrix X
remains free. Theorem 2.3 picks the X for which dA and dB are nearest to LoRA's own gradients.
In this project's names, with P = AᵀA and Q = BᵀB:

    dB = s⁻² ∇B P⁻¹ + B Xᵀ
    dA = s⁻² (∇A − A P⁻¹ Aᵀ∇A) Q⁻¹ − A X,      P X + X Q = −s⁻² P⁻¹ ∇Bᵀ B

Everything except A, B and their gradients is r × r. It comes from the same grams as in the ScaLoRA
transform: one all-reduce for all layers. The optimizer then sees dA and dB.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from scalora_dist.core import host
from scalora_dist.core.grams import GramSums, packed
from scalora_dist.core.layout import Layout
from scalora_dist.engines.base import Engine
from scalora_dist.engines.layer_shards import LayerShards, factor_shards, gradient_shards
from scalora_dist.errors import UserError
from scalora_dist.methods.transform import Transform, TransformReport
from scalora_dist.profiling.clock import Clock

DAMPING = 1e-8  # δ of (AᵀA + δ·1)⁻¹: AᵀA is singular at the start, where A = 0


class LoraPro(Transform):
    """Overwrites ∇A and ∇B with dA and dB, in place on this rank's shards.

    Collectives per step: one all-reduce of grams and one broadcast of the solution.
    """

    name = "lora_pro"

    def __init__(self, engine: Engine) -> None:
        """
        Raises:
            UserError: the engine keeps gradients in fp16. P⁻¹ makes them too large for its range.
        """
        if engine.gradient_dtype == torch.float16:
            raise UserError(
                "--method lora-pro overflows fp16 gradients: set --bf16, or ZeRO stage 2 or 3, "
                "which keep gradients in fp32"
            )
        self.world = engine.world
        shards = factor_shards(engine.layer_shards(gradients=False))
        self.layout = Layout.of(shards, self.world.device)
        self.sums = GramSums(self.layout)

    @torch.no_grad()
    def __call__(self, layers: Sequence[LayerShards], clock: Clock) -> TransformReport:
        clock.begin("grams")
        gradients = gradient_shards(layers)
        columns = packed(self.layout, [factor_shards(layers), gradients], torch.float32)
        grams = self.sums(columns, 2)
        clock.begin("solve")
        found = host.on_host(partial(_solve, [layer.scaling for layer in layers]), grams.sums)
        if found is None:
            return self.refuse(layers)
        solved, sums = found
        # Each rank has found them. Rank 0's are taken, so that they are the same everywhere.
        mixes = self.world.from_rank_0(host.to_device(solved, self.world.device))
        before, after = host.on_host(partial(_norms, sums), mixes)
        clock.begin("mix")
        for batch, mixed in self.sums.mixed(columns, grams, mixes):
            self.layout.unpack(batch, (mixed, gradients))
        return TransformReport(applied=True, grad_norm_before=before, grad_norm=after)


def _solve(scalings: Sequence[float], grams: Tensor) -> tuple[Tensor, Tensor] | None:
    """The mixing matrices of A and B of each layer in turn, (2·layers, 2r, r) float64.

    Args:
        scalings: s of each layer.
        grams: of A and B of each layer in turn, as for ``mixing_matrices``.

    Returns:
        the matrices and the grams. None: a gram is not finite.
    """
    if not bool(torch.isfinite(grams).all()):
        return None
    s = torch.tensor(scalings, dtype=torch.float64)
    mixes = torch.stack(mixing_matrices(grams[0::2], grams[1::2], s), dim=1)
    return mixes.flatten(0, 1), grams


def mixing_matrices(gram_a: Tensor, gram_b: Tensor, scalings: Tensor) -> tuple[Tensor, Tensor]:
    """M_A and M_B with ``dA = [A, ∇A] M_A`` and ``dB = [B, ∇B] M_B``: (layers, 2r, r) each.

    Args:
        gram_a: [A, ∇A]ᵀ[A, ∇A], (layers, 2r, 2r) float64.
        gram_b: [B, ∇B]ᵀ[B, ∇B], (layers, 2r, 2r) float64.
        scalings: s of each layer, (layers,) float64.
    """
    r = gram_a.shape[-1] // 2
    eye = torch.eye(r, dtype=gram_a.dtype)
    P, Q = gram_a[:, :r, :r], gram_b[:, :r, :r]
    P_inverse, Q_inverse = (torch.linalg.inv(gram + DAMPING * eye) for gram in (P, Q))
    share = 1 / scalings[:, None, None] ** 2
    A_grad, B_grad = gram_a[:, :r, r:], gram_b[:, :r, r:]  # Aᵀ∇A, Bᵀ∇B
    X = _sylvester(P, Q, -share * P_inverse @ B_grad.mT)
    on_A = -share * P_inverse @ A_grad @ Q_inverse - X
    return torch.cat([on_A, share * Q_inverse], 1), torch.cat([X.mT, share * P_inverse], 1)


def _sylvester(P: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """Solve ``P X + X Q = C`` for X by the eigenvectors of the symmetric P and Q.

    A component of X is 0 where the sum of the two eigenvalues is not positive.
    """
    p, U = torch.linalg.eigh(P)
    q, V = torch.linalg.eigh(Q)
    sums = p[:, :, None] + q[:, None, :]
    rotated = U.mT @ C @ V
    return U @ torch.where(sums > 0, rotated / sums, torch.zeros_like(rotated)) @ V.mT


def _norms(grams: Tensor, mixes: Tensor) -> tuple[float, float]:
    """The norm of the gradients of all layers, before and after the mixing."""
    r = mixes.shape[-1]
    found = grams[:, r:, r:], mixes.mT @ grams @ mixes
    before, after = (x.diagonal(dim1=-2, dim2=-1).sum().sqrt().item() for x in found)
    return before, after
