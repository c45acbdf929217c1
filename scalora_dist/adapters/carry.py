"""A layer with factors A and B and, beside a W that nothing can be merged into, a carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scalora_dist.adapters.layers import LowRankLinear


class CarryLinear(LowRankLinear):
    """ΔW = A Bᵀ + C Dᵀ: A (m, r) and B (n, r) trained, C (m, K) and D (n, K) what was merged.

    C and D are frozen and change by merges alone, from column 0 on; the columns from ``used`` on
    are zero.
    """

    C: nn.Parameter
    D: nn.Parameter
    used: int

    def add_carry(self, columns: int, dtype: torch.dtype) -> None:
        """An empty carry with room for K = ``columns``."""
        m, n = self.out_features, self.in_features
        self.C = nn.Parameter(torch.zeros(m, columns, dtype=dtype), requires_grad=False)
        self.D = nn.Parameter(torch.zeros(n, columns, dtype=dtype), requires_grad=False)
        self.used = 0

    def update(self, x: Tensor) -> Tensor:
        return _TwoProducts.apply(x, self.A, self.B, self.C, self.D, self.used)

    def merge_(self, weight: Tensor, own: Mapping[str, Tensor]) -> None:
        super().merge_(weight, own)
        weight.addmm_(own["C"], own["D"].T, alpha=self.scaling)


class _TwoProducts(torch.autograd.Function):
    """``[A, C] ([B, D]ᵀ x)``: no more products than A and B alone take, forward and to x.

    Gradients go to x, A and B; C and D cost none. What is kept for the backward are the parameters
    themselves, which engines free and gather, not the concatenations.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, used: int
    ) -> Tensor:
        z = x @ _beside(B, D, used, x.dtype)
        # Only the part of z that A's gradient takes.
        ctx.save_for_backward(x, z[..., : A.shape[1]].clone(), A, B, C, D)
        ctx.used = used
        return z @ _beside(A, C, used, x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, A, B, C, D = ctx.saved_tensors
        rank = A.shape[1]
        grad_z = grad_y @ _beside(A, C, ctx.used, grad_y.dtype)
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_z @ _beside(B, D, ctx.used, grad_y.dtype).T
        if ctx.needs_input_grad[1]:
            grad_A = (grad_y.flatten(0, -2).T @ z.flatten(0, -2)).to(A.dtype)
        if ctx.needs_input_grad[2]:
            grad_B = (x.flatten(0, -2).T @ grad_z[..., :rank].flatten(0, -2)).to(B.dtype)
        return grad_x, grad_A, grad_B, None, None, None


def _beside(trained: Tensor, carried: Tensor, used: int, dtype: torch.dtype) -> Tensor:
    return torch.cat([trained.to(dtype), carried[:, :used].to(dtype)], dim=1)
