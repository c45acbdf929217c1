"""How high the rank of the accumulated update W_T + s·A Bᵀ − W_0 has grown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scalora_dist.engines.base import LayerShards
from scalora_dist.merge import merged_weight
from scalora_dist.shards import Layout
from scalora_dist.world import World

# A singular value counts from this share of the largest on.
RELATIVE_THRESHOLD = 1e-3


class UpdateRank:
    """Remembers this rank's shards of a few layers' initial weights, spread over the model."""

    def __init__(self, layers: Sequence[LayerShards], count: int, world: World) -> None:
        count = min(count, len(layers))
        self.chosen = [i * len(layers) // count for i in range(count)]
        self.initial = [layers[i].W.local.clone() for i in self.chosen]
        self.world = world

    @torch.no_grad()
    def measure(self, layers: Sequence[LayerShards], low: dict[str, Tensor]) -> list[int]:
        """The numerical rank of each remembered layer's update, on every rank.

        One layer's update is whole at a time; the ranks take turns with the SVDs.
        """
        ranks = []
        for turn, (i, initial) in enumerate(zip(self.chosen, self.initial, strict=True)):
            layer = layers[i]
            factors = [layer.A, layer.B]
            a, b = Layout.of(factors, self.world.device).gather(factors, range(2))
            update = merged_weight(layer.W, layer.scaling * a, b, low.get(layer.name))
            update.local.sub_(initial)
            (whole,) = Layout.of([update], self.world.device).gather([update], range(1))
            mine = turn % self.world.size == self.world.rank
            ranks.append(numerical_rank(whole) if mine else 0)
        return [int(rank) for rank in self.world.sum(*ranks)]


def numerical_rank(matrix: Tensor) -> int:
    """Singular values above ``RELATIVE_THRESHOLD`` of the largest; 0 for a zero matrix."""
    values = torch.linalg.svdvals(matrix)
    return int((values > RELATIVE_THRESHOLD * values[0]).sum()) if values[0] > 0 else 0
