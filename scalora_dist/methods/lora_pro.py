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

import torch
from torch import Tensor

from scalora_dist.core.flat_shard import Layout, mixed_rows
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

    @torch.no_grad()
    def __call__(self, layers: Sequence[LayerShards], clock: Clock) -> TransformReport:
        clock.begin("grams")
        stacks = list(zip(factor_shards(layers), gradient_shards(layers), strict=True))
        grams, split_rows = self.layout.grams_and_split_rows(stacks)
        clock.begin("solve")
        gram_a, gram_b = (torch.stack(grams[side::2]).cpu() for side in (0, 1))
        if not bool(torch.isfinite(gram_a).all() & torch.isfinite(gram_b).all()):
            return self.refuse(layers)
        scalings = torch.tensor([layer.scaling for layer in layers], dtype=torch.float64)
        mixed = torch.stack(mixing_matrices(gram_a, gram_b, scalings))
        mixes = mix_a, mix_b = self.world.from_rank_0(mixed).unbind()
        before, after = _norms((gram_a, gram_b), (mix_a, mix_b))
        clock.begin("mix")
        for i, stack in enumerate(stacks):
            mix = mixes[i % 2][i // 2]
            stack[1].local.copy_(mixed_rows(stack, mix, self.layout.split[i], split_rows[i]))
        return TransformReport(applied=True, grad_norm_before=before, grad_norm=after)


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


def _norms(grams: tuple[Tensor, Tensor], mixes: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The norm of the gradients of all layers, before and after the mixing."""
    squares = torch.zeros(2, dtype=torch.float64)
    for gram, mix in zip(grams, mixes, strict=True):
        r = mix.shape[-1]
        for i, norms in enumerate((gram[:, r:, r:], mix.mT @ gram @ mix)):
            squares[i] += norms.diagonal(dim1=-2, dim2=-1).sum()
    before, after = squares.sqrt().tolist()
    return before, after
