"""A layer with factors A and B and a carry, which takes the merges that W cannot take."""

from __future__ import annotations

from collections.abc import Mapping

import torch
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

    def add_carry(self, columns: int, dtype: torch.dtype) -> None:
        """Add an empty carry with room for K = ``columns`` columns."""
        m, n = self.out_features, self.in_features
        self.C = nn.Parameter(torch.zeros(m, columns, dtype=dtype), requires_grad=False)
        self.D = nn.Parameter(torch.zeros(n, columns, dtype=dtype), requires_grad=False)
        self.used = 0

    @property
    def carried(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.C, self.D

    def merge_(self, weight: Tensor, own: Mapping[str, Tensor]) -> None:
        super().merge_(weight, own)
        weight.addmm_(own["C"], own["D"].T, alpha=self.scaling)
