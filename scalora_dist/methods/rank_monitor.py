"""Estimates rank and largest singular values of some layers' updates during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from scalora_dist.core import host
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
        self.device = world.device

    def add(self, layers: Sequence[LayerShards], weights: Tensor) -> None:
        """Record the merge ``W += A diag(weights) Bᵀ``: one all-reduce.

        Args:
            weights: one factor per column of all layers, (layers, r) on the CPU.
        """
        mine = host.to_device(weights[self.chosen], self.device)
        self.sketch.add(self._factors(layers), mine)

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


def spread_out(names: Sequence[str], count: int) -> list[str]:
    """``count`` of the layers' names (or all, if there are fewer), in the given order.

    Each kind of layer (a name without block numbers) occurs equally often, as far as it has layers.
    The blocks are spread over the depth: each kind begins a bit deeper than the one before it.

    Args:
        names: names of different layers in model order.
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        layers.setdefault(kind, []).append(name)
    shares = dict.fromkeys(layers, 0)
    missing = min(count, len(names))
    while missing:
        open_kinds = [kind for kind, share in shares.items() if share < len(layers[kind])]
        some = min(missing, len(open_kinds))
        for i in range(some):
            shares[open_kinds[i * len(open_kinds) // some]] += 1
        missing -= some
    chosen = [kind for kind, share in shares.items() if share]
    picked = {
        # Exactly (j + k / len(chosen)) / share of the kind's depth. The steps are at least a layer.
        layers[kind][(j * len(chosen) + k) * len(layers[kind]) // (len(chosen) * shares[kind])]
        for k, kind in enumerate(chosen)
        for j in range(shares[kind])
    }
    return [name for name in names if name in picked]
