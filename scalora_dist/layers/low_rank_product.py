"""The product ``W x + bias + s·A Bᵀ x`` of an adapted layer, in few kernels and few bytes.

The factor s and the sum with W x are part of the product with A (BLAS's alpha and beta), which
rounds once. Besides the products, no kernel reads or writes a tensor of m or n features per token.
In the backward the two gradients of x are summed in the same way. So their order is the same on all
engines.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Coded(Protocol):
    """A layer whose W is stored as codes (``FourBitLinear``)."""

    def product(self, x: Tensor, codes: Tensor) -> Tensor:
        """W x + bias, without autograd."""

    def gradient(self, grad_y: Tensor, codes: Tensor) -> Tensor:
        """The gradient of x."""


class LowRankProduct(torch.autograd.Function):
    """``y = W x + bias + s·[A, C] [Bᵀ d; Dᵀ x]``, where d is x after dropout.

    C and D are the filled columns of a carry. Only x, A and B get gradients. For the backward the
    parameters themselves are saved, and not views of them or concatenations: some engines free a
    layer's parameters after its forward, and gather them again for its backward. But of fp32
    masters beside activations in 16 bits, without a carry, the copies of A and B in 16 bits are
    saved. They are small.

    x and y have two dimensions. A view that is made in here could not be changed in place, as some
    models do with a layer's output. So the caller reshapes. This does not work under autocast or
    torch.func.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        C: Tensor | None,
        D: Tensor | None,
        used: int,
        scaling: float,
        coded: Coded | None,
    ) -> Tensor:
        """
        Args:
            x: input (tokens, n).
            dropped: d (tokens, n); None: x itself.
            weight: W (m, n), or its codes.
            bias: (m,), or None.
            A: (m, r), as all factors of x's dtype or fp32 masters.
            B: (n, r).
            C: left factor of the carry (m, K), or None.
            D: right factor of the carry (n, K), or None.
            used: number of filled columns of C and D.
            scaling: s.
            coded: the layer, if ``weight`` has codes.

        Returns:
            y (tokens, m).
        """
        rank = A.shape[1]
        seen = x if dropped is None else dropped
        low_A, low_B = A.to(x.dtype), B.to(x.dtype)
        if dropped is None or not used:
            z = seen @ _beside(low_B, D, used)
        else:
            z = torch.cat([seen @ low_B, x @ _filled(D, used, x.dtype)], dim=1)
        if coded is not None:
            y = coded.product(x, weight)
        else:
            y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        y.addmm_(z, _beside(low_A, C, used).T, alpha=scaling)
        # Beside a carry, the backward casts A and B again, with C and D.
        ctx.save_for_backward(
            seen,
            z[:, :rank].clone() if used else z,
            weight,
            *((A, B) if used else (low_A, low_B)),
            C,
            D,
        )
        ctx.used, ctx.scaling, ctx.coded = used, scaling, coded
        ctx.drops, ctx.dtypes = dropped is not None, (A.dtype, B.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert not ctx.needs_input_grad[2] and not ctx.needs_input_grad[3], "W and bias are frozen"
        seen, z, weight, A, B, C, D = ctx.saved_tensors
        rank, used = z.shape[1], ctx.used
        A, B = A.to(grad.dtype), B.to(grad.dtype)
        grad_x = grad_dropped = grad_A = grad_B = None
        grad_z = _product(ctx.scaling, grad, _beside(A, C, used))
        if ctx.needs_input_grad[0]:
            grad_x = ctx.coded.gradient(grad, weight) if ctx.coded else grad @ weight
            if not ctx.drops:
                grad_x.addmm_(grad_z, _beside(B, D, used).T)
            elif used:
                grad_x.addmm_(grad_z[:, rank:], _filled(D, used, grad.dtype).T)
        if ctx.needs_input_grad[1]:
            grad_dropped = grad_z[:, :rank] @ B.T
        if ctx.needs_input_grad[4]:
            grad_A = _gradient(ctx.scaling, grad, z).to(ctx.dtypes[0])
        if ctx.needs_input_grad[5]:
            grad_B = _gradient(1.0, seen, grad_z[:, :rank]).to(ctx.dtypes[1])
        return grad_x, grad_dropped, None, None, grad_A, grad_B, *[None] * 5


def _filled(carried: Tensor | None, used: int, dtype: torch.dtype) -> Tensor:
    assert carried is not None
    return carried[:, :used].to(dtype)


def _beside(trained: Tensor, carried: Tensor | None, used: int) -> Tensor:
    """[A, C] or [B, D]."""
    if not used:
        return trained
    return torch.cat([trained, _filled(carried, used, trained.dtype)], dim=1)


def _gradient(scaling: float, wide: Tensor, thin: Tensor) -> Tensor:
    """``s·wideᵀ thin``, the gradient of a factor."""
    # A CPU's BLAS is up to four times as fast in the other order.
    if wide.device.type == "cpu" and wide.dtype == torch.float32:
        return _product(scaling, thin.T, wide).T
    return _product(scaling, wide.T, thin)


def _product(scaling: float, a: Tensor, b: Tensor) -> Tensor:
    """``s·a b`` in one kernel. With beta = 0, BLAS reads nothing of what it overwrites."""
    if scaling == 1:
        return a @ b
    out = a.new_empty(a.shape[0], b.shape[1])
    return out.addmm_(a, b, beta=0, alpha=scaling)
