"""The low-rank layer: a linear layer that also has the two tall factors A and B."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LowRankLinear(nn.Linear):
    """``y = W x + bias + s · A (Bᵀ dropout(x))`` with W and bias frozen, A and B trained.

    W is (m, n) = (out_features, in_features), A is (m, r), B is (n, r): both factors are tall, so
    that a shard of rows is a shard of features. In PEFT's names A is ``lora_B.weight`` and Bᵀ is
    ``lora_A.weight``.

    Made from a linear layer by changing that object's class, so the layer keeps its name, its
    parameters (whatever an engine already hung on them) and every reference to it; a state dict has
    the model's own keys plus ``<layer>.A`` and ``<layer>.B``.
    """

    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    dropout: float

    @staticmethod
    def adapt(
        linear: nn.Linear, a: Tensor, b: Tensor, *, scaling: float, dropout: float
    ) -> LowRankLinear:
        """Turn ``linear`` into a LowRankLinear in place, starting at A = a (m, r), B = b (n, r)."""
        linear.__class__ = LowRankLinear
        assert isinstance(linear, LowRankLinear)
        linear.A, linear.B = nn.Parameter(a), nn.Parameter(b)
        linear.scaling, linear.dropout = scaling, dropout
        return linear

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        # The factors may be fp32 masters beside a 16-bit base; else `to` gives B itself.
        z = F.dropout(x, self.dropout, self.training)
        # matmul keeps B itself for the backward; F.linear would keep the view Bᵀ and, with it under
        # ZeRO-3, all of B gathered from this layer's forward to its backward.
        update = F.linear(z @ self.B.to(x.dtype), self.A.to(x.dtype))
        return y + self.scaling * update.to(y.dtype)
