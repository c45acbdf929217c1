"""How high the rank of the accumulated update W_T + s·A Bᵀ − W_0 has grown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scalora_dist.engines.base import LayerShards
from scalora_dist.merge import merged_weight
from scalora_dist.shards import Layout

# A singular value counts from this share of the largest on.
RELATIVE_THRESHOLD = 1e-3


class UpdateRank:
    """Remembers this rank's shards of a few layers' initial weights, spread over the model."""

    def __init__(self, layers: Sequence[LayerShards], count: int, device: torch.device) -> None:
        count = min(count, len(layers))
        self.chosen = [i * len(layers) // count for i in range(count)]
        self.initial = [layers[i].W.local.clone() for i in self.chosen]
        self.device = device

    @torch.no_grad()
    def measure(self, layers: Sequence[LayerShards], low: dict[str, Tensor]) -> list[int]:
        """The numerical rank of each remembered layer's update, on every rank.

        One layer's update is whole at a time: two gathers and an SVD each.
        """
        ranks = []
        for i, initial in zip(self.chosen, self.initial, strict=True):
            layer = layers[i]
            factors = [layer.A, layer.B]
            a, b = Layout.of(factors, self.device).gather(factors, range(2))
            update = merged_weight(layer.W, layer.scaling * a, b, low.get(layer.name))
            update.local.sub_(initial)
            (whole,) = Layout.of([update], self.device).gather([update], range(1))
            ranks.append(numerical_rank(whole))
        return ranks


def numerical_rank(matrix: Tensor) -> int:
    """Singular values above ``RELATIVE_THRESHOLD`` of the largest; 0 for a zero matrix."""
    values = torch.linalg.svdvals(matrix)
    return int((values > RELATIVE_THRESHOLD * values[0]).sum()) if values[0] > 0 else 0
