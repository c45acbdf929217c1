"""Merges products of A and B of all layers into W, or into the carry beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scalora_dist.core.flat_shard import Layout
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards, factor_shards
from scalora_dist.methods.merge_target import MergeTarget
from scalora_dist.methods.rank_monitor import RankMonitor
from scalora_dist.profiling.clock import Clock


class Merger:
    """Gathers A and B of each layer and merges their products.

    Attributes:
        world: the ranks.
        target: what the products are added to.
        layout: which rank holds which range of A and B, for each layer in turn.
        monitor: tracks the rank of the accumulated update. It is called at every merge.
    """

    monitor: RankMonitor | None = None

    def __init__(self, layers: Sequence[LayerShards], world: World, target: MergeTarget) -> None:
        """Exchange which rank holds which range (one all-gather).

        Args:
            layers: the layers, in the same order as in every later call.
        """
        self.world = world
        self.target = target
        self.layout = Layout.of(factor_shards(layers), world.device)

    @torch.no_grad()
    def __call__(
        self,
        layers: Sequence[LayerShards],
        weights: Tensor,
        clock: Clock,
        which: Sequence[int] | None = None,
    ) -> None:
        """Add ``s·A diag(weights) Bᵀ`` to the target of each layer.

        A and B are gathered in full: one all-gather per bucket of layers. W is never sent.

        Args:
            weights: one factor per column, (layers, r) float64 on the CPU.
            which: numbers of the layers to merge, the same on every rank. None: all layers.
        """
        shards = factor_shards(layers)
        clock.begin("gather")
        # One copy to the device for all layers: one copy per layer would synchronize each time.
        on_device = weights.to(self.world.device)
        if self.monitor:
            clock.begin("monitor")
            scalings = torch.tensor([[layer.scaling] for layer in layers]).to(on_device)
            self.monitor.add(layers, scalings * on_device)
        chosen = range(len(layers)) if which is None else which
        self.target.make_room(layers, chosen, clock)
        for bucket in self.layout.buckets([(2 * i, 2 * i + 1) for i in chosen]):
            clock.begin("gather")
            gathered = self.layout.gather(shards, bucket)
            clock.begin("merge")
            for i, a, b in zip(bucket[::2], gathered[0::2], gathered[1::2], strict=True):
                self.target.add(layers[i // 2], a * on_device[i // 2].to(a), b)
