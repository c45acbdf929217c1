"""Merging products of A and B into this rank's shards of W, for all layers of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scalora_dist.engines.base import LayerShards, factor_shards
from scalora_dist.merge import MergeRounding, add_low_rank_, zero_low_half
from scalora_dist.monitor import UpdateMonitor
from scalora_dist.profiling.clock import Clock
from scalora_dist.shards import Layout
from scalora_dist.world import World


class Merger:
    """Holds what of a model's merges does not change between steps, and what they leave.

    Attributes:
        layout: of the factors, A and B of each layer in turn.
        low: {layer: int16 remainders of its 16-bit W}, with ``split`` only; sharded like W.
        monitor: is told of every merge.
    """

    monitor: UpdateMonitor | None = None

    def __init__(
        self, layers: Sequence[LayerShards], world: World, rounding: MergeRounding
    ) -> None:
        """Exchange who holds what (one all-gather); ``layers`` in the order of every later call."""
        self.world = world
        self.layout = Layout.of(factor_shards(layers), world.device)
        self.low: dict[str, Tensor] = {}
        if rounding == "split":
            self.low = {
                layer.name: zero_low_half(layer.W)
                for layer in layers
                if layer.W.local.dtype != torch.float32
            }

    @torch.no_grad()
    def __call__(
        self,
        layers: Sequence[LayerShards],
        weights: Tensor,
        clock: Clock,
        which: Sequence[int] | None = None,
    ) -> None:
        """``W += s·A diag(weights) Bᵀ``: A and B whole by all-gathers in buckets; W never travels.

        Args:
            weights: (layers, r) float64 on the CPU.
            which: the layers to merge, by number, the same on every rank; None: all.
        """
        shards = factor_shards(layers)
        scalings = torch.tensor([[layer.scaling] for layer in layers], dtype=torch.float64)
        # One copy to the device for all layers: a copy each would wait for it each time.
        scaled = (scalings * weights).to(self.world.device)
        if self.monitor:
            self.monitor.add(layers, scaled)
            clock.lap("monitor")
        chosen = range(len(layers)) if which is None else which
        for bucket in self.layout.buckets([(2 * i, 2 * i + 1) for i in chosen]):
            gathered = self.layout.gather(shards, bucket)
            clock.lap("gather")
            for i, a, b in zip(bucket[::2], gathered[0::2], gathered[1::2], strict=True):
                layer = layers[i // 2]
                left = a * scaled[i // 2].to(a)
                add_low_rank_(layer.W, left, b, self.low.get(layer.name))
            clock.lap("merge")
