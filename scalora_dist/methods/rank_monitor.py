"""Estimates rank and largest singular values of some layers' updates during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.rank_sketch import RankSketch
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards


class RankMonitor:
    """Sketches the updates of some layers, spread over the model. It copies no initial weight."""

    def __init__(
        self, layers: Sequence[LayerShards], count: int, world: World, *, seed: int
    ) -> None:
        """
        Args:
            count: number of layers to sketch.
        """
        names = [layer.name for layer in layers]
        self.chosen = [names.index(name) for name in spread_out(names, count)]
        factors = self._factors(layers)
        self.sketch = RankSketch([names[i] for i in self.chosen], factors, world.device, seed=seed)
        self.shards = self.sketch.shards

    def add(self, layers: Sequence[LayerShards], weights: Tensor) -> None:
        """Record the merge ``W += A diag(weights) Bᵀ``: one all-reduce.

        Args:
            weights: one factor per column of all layers, (layers, r).
        """
        self.sketch.add(self._factors(layers), weights[self.chosen])

    def read(self, layers: Sequence[LayerShards]) -> dict[str, dict[str, Any]]:
        """{layer: its rank, whether that is a lower bound, its largest singular values}.

        A collective. The same on every rank.
        """
        scalings = [layers[i].scaling for i in self.chosen]
        spectra = self.sketch.read(self._factors(layers), scalings)
        return {
            name: {
                "rank": spectrum.rank,
                "at_least": spectrum.full,
                **{f"singular_value_{k}": value for k, value in enumerate(spectrum.values, 1)},
            }
            for name, spectrum in zip(self.sketch.names, spectra, strict=True)
        }

    def _factors(self, layers: Sequence[LayerShards]) -> list[tuple[FlatShard, FlatShard]]:
        return [(layers[i].A, layers[i].B) for i in self.chosen]


def spread_out(names: list[str], count: int) -> list[str]:
    """``count`` of the names (or all, if there are fewer), spread evenly over the model."""
    count = min(count, len(names))
    return [names[i * len(names) // count] for i in range(count)]
