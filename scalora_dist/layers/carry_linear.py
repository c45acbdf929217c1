"""A layer with factors A and B and a carry, which takes the merges that W cannot take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalora_dist.layers.adapted_linear import LowRankLinear


class CarryLinear(LowRankLinear):
    """ΔW = A Bᵀ + C Dᵀ: A (m, r) and B (n, r) are trained, C (m, K) and D (n, K) hold the merges.

    C and D are frozen. Only merges change them, and fill their columns from 0 on.

    Attributes:
        C: left factor of the carry, (m, K).
        D: right factor of the carry, (n, K).
        used: number of filled columns; the columns from ``used`` on are zero.
    """

    C: nn.Parameter
    D: nn.Parameter
    used: int

    def add_carry(self, columns: int, dtype: torch.dtype) -> None:
        """Add an empty carry with room for K = ``columns`` columns."""
        m, n = self.out_features, self.in_features
        self.C = nn.Parameter(torch.zeros(m, columns, dtype=dtype), requires_grad=False)
        self.D = nn.Parameter(torch.zeros(n, columns, dtype=dtype), requires_grad=False)
        self.used = 0

    @property
    def carried(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.C, self.D

    def added(self, x: Tensor) -> Tensor:
        # No dropout for the carry, as if it were in W.
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else None
        return _TwoProducts.apply(x, dropped, self.A, self.B, self.C, self.D, self.used)

    def merge_(self, weight: Tensor, own: Mapping[str, Tensor]) -> None:
        super().merge_(weight, own)
        weight.addmm_(own["C"], own["D"].T, alpha=self.scaling)


class _TwoProducts(torch.autograd.Function):
    """``[A, C] ([B, D]ᵀ x)``, with as many products as A and B alone in forward and x's gradient.

    With dropout, which only B's input gets, [B, D]ᵀ x takes two products. Only x, A and B get
    gradients. For the backward, the parameters themselves are saved, which engines free and gather,
    and not the concatenations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        used: int,
    ) -> Tensor:
        """
        Args:
            dropped: x after dropout, for B; None: no dropout.
            used: number of filled columns of C and D.
        """
        if dropped is None:
            z = x @ _beside(B, D, used, x.dtype)
        else:
            z = torch.cat([dropped @ B.to(x.dtype), x @ D[:, :used].to(x.dtype)], dim=-1)
        # Of x and z, only what the gradients of A and B need.
        seen = x if dropped is None else dropped
        ctx.save_for_backward(seen, z[..., : A.shape[1]].clone(), A, B, C, D)
        ctx.used, ctx.drops = used, dropped is not None
        return z @ _beside(A, C, used, x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        seen, z, A, B, C, D = ctx.saved_tensors
        rank, dtype = A.shape[1], grad_y.dtype
        grad_z = grad_y @ _beside(A, C, ctx.used, dtype)
        to_B, to_D = grad_z.split([rank, ctx.used], dim=-1)
        grad_x = grad_dropped = grad_A = grad_B = None
        if ctx.needs_input_grad[0] and not ctx.drops:
            grad_x = grad_z @ _beside(B, D, ctx.used, dtype).T
        elif ctx.needs_input_grad[0]:
            grad_x, grad_dropped = to_D @ D[:, : ctx.used].to(dtype).T, to_B @ B.to(dtype).T
        if ctx.needs_input_grad[2]:
            grad_A = (_rows(grad_y).T @ _rows(z)).to(A.dtype)
        if ctx.needs_input_grad[3]:
            grad_B = (_rows(seen).T @ _rows(to_B)).to(B.dtype)
        return grad_x, grad_dropped, grad_A, grad_B, None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _beside(trained: Tensor, carried: Tensor, used: int, dtype: torch.dtype) -> Tensor:
    return torch.cat([trained.to(dtype), carried[:, :used].to(dtype)], dim=1)
