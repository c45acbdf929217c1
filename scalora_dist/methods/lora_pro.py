"""LoRA-Pro (arXiv 2407.18242): gradients whose joint step is nearest to full fine-tuning's.

The step of A and B moves the weight by ``s·(dA Bᵀ + A dBᵀ)``. Least squares against the gradient of
W gives dA and dB in closed form from the factors and their gradients (Theorem 2.1); one matrix X is
free, and Theorem 2.3 picks the one for which dA and dB are nearest to LoRA's own gradients. In our
names, with P = AᵀA and Q = BᵀB:

    dB = s⁻² ∇B P⁻¹ + B Xᵀ
    dA = s⁻² (∇A − A P⁻¹ Aᵀ∇A) Q⁻¹ − A X,      P X + X Q = −s⁻² P⁻¹ ∇Bᵀ B

Everything but the rows of A, B and their gradients is r × r and comes from the grams that the
ScaLoRA transform takes too: one all-reduce for all layers. The optimizer then sees dA and dB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scalora_dist.core.flat_shard import Layout, mixed_rows
from scalora_dist.engines.base import Engine
from scalora_dist.engines.layer_shards import LayerShards, factor_shards, gradient_shards
from scalora_dist.errors import UserError
from scalora_dist.methods.transform import Report, Transform
from scalora_dist.profiling.clock import Clock

DAMPING = 1e-8  # δ of (AᵀA + δ·1)⁻¹: A = 0 at the start


class LoraPro(Transform):
    """Puts dA and dB in the place of ∇A and ∇B, on each rank's own rows."""

    name = "lora_pro"

    def __init__(self, engine: Engine) -> None:
        """
        Raises:
            UserError: fp16, whose gradients have no room for what P⁻¹ makes of them.
        """
        if engine.dtype == torch.float16:
            raise UserError("--method lora-pro overflows fp16 gradients: set --bf16 or neither")
        self.world = engine.world
        shards = factor_shards(engine.layer_shards(gradients=False))
        self.layout = Layout.of(shards, self.world.device)

    @torch.no_grad()
    def __call__(self, layers: Sequence[LayerShards], clock: Clock) -> Report:
        clock.begin("grams")
        stacks = list(zip(factor_shards(layers), gradient_shards(layers), strict=True))
        grams, split_rows = self.layout.grams_and_split_rows(stacks)
        clock.begin("solve")
        gram_a, gram_b = (torch.stack(grams[side::2]).cpu() for side in (0, 1))
        if not bool(torch.isfinite(gram_a).all() & torch.isfinite(gram_b).all()):
            return self.refuse(layers)
        scalings = torch.tensor([layer.scaling for layer in layers], dtype=torch.float64)
        mixed = torch.stack(mixing_matrices(gram_a, gram_b, scalings))
        mixes = mix_a, mix_b = self.world.same(mixed).unbind()
        before, after = _norms((gram_a, gram_b), (mix_a, mix_b))
        clock.begin("mix")
        for i, stack in enumerate(stacks):
            mix = mixes[i % 2][i // 2]
            stack[1].local.copy_(mixed_rows(stack, mix, self.layout.split[i], split_rows[i]))
        return Report(applied=True, grad_norm_before=before, grad_norm=after)


def mixing_matrices(gram_a: Tensor, gram_b: Tensor, scalings: Tensor) -> tuple[Tensor, Tensor]:
    """(2r, r) matrices M with ``dA = [A, ∇A] M_A`` and ``dB = [B, ∇B] M_B``, for each layer.

    Args:
        gram_a: [A, ∇A]ᵀ[A, ∇A], (layers, 2r, 2r) float64. gram_b: [B, ∇B]ᵀ[B, ∇B], likewise.
        scalings: s, (layers,).
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
    """X of ``P X + X Q = C`` for symmetric P and Q, by their eigenvectors; 0 where both are 0."""
    p, U = torch.linalg.eigh(P)
    q, V = torch.linalg.eigh(Q)
    sums = p[:, :, None] + q[:, None, :]
    rotated = U.mT @ C @ V
    return U @ torch.where(sums > 0, rotated / sums, torch.zeros_like(rotated)) @ V.mT


def _norms(grams: tuple[Tensor, Tensor], mixes: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Of all gradients, before and after the mixing."""
    squares = torch.zeros(2, dtype=torch.float64)
    for gram, mix in zip(grams, mixes, strict=True):
        r = mix.shape[-1]
        for i, norms in enumerate((gram[:, r:, r:], mix.mT @ gram @ mix)):
            squares[i] += norms.diagonal(dim1=-2, dim2=-1).sum()
    before, after = squares.sqrt().tolist()
    return before, after
