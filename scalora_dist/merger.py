"""Merging products of A and B, for all layers of a model: into W, or into what stands for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scalora_dist.engines.base import LayerShards, factor_shards
from scalora_dist.merge import MergeRounding, add_low_rank_, zero_low_half
from scalora_dist.monitor import UpdateMonitor
from scalora_dist.profiling.clock import Clock
from scalora_dist.shards import Layout
from scalora_dist.world import World


class MergeTarget(ABC):
    """What merges are added to, and what that leaves.

    Attributes:
        low: {parameter: int16 remainders of its 16-bit values}; sharded like it.
    """

    low: Mapping[str, Tensor]

    def make_room(  # noqa: B027
        self, layers: Sequence[LayerShards], which: Sequence[int], clock: Clock
    ) -> None:
        """Prepare for one ``add`` to each of the layers ``which``; called on every rank."""

    @abstractmethod
    def add(self, layer: LayerShards, left: Tensor, right: Tensor) -> None:
        """Add ``s·left rightᵀ`` to a layer's frozen part; local.

        Args:
            left: (m, r) float32, whole. right: (n, r) float32, whole.
        """

    def finish(self, layers: Sequence[LayerShards]) -> None:  # noqa: B027
        """After the last merge of a run."""

    def report(self) -> dict[str, Any]:
        """What metrics.jsonl is to know of the merges since the last call."""
        return {}

    def summary(self) -> dict[str, Any]:
        """What summary.json is to know of it at the end."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides tensors, the same on every rank."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go back to ``state``."""


class IntoWeights(MergeTarget):
    """W itself, on the ranges of it that this rank owns."""

    def __init__(self, layers: Sequence[LayerShards], rounding: MergeRounding) -> None:
        self.low: dict[str, Tensor] = {}
        if rounding == "split":
            self.low = {
                f"{layer.name}.weight": zero_low_half(layer.W)
                for layer in layers
                if layer.W.local.dtype != torch.float32
            }

    def add(self, layer: LayerShards, left: Tensor, right: Tensor) -> None:
        add_low_rank_(layer.W, left * layer.scaling, right, self.low.get(f"{layer.name}.weight"))


class Merger:
    """Gathers A and B of layer after layer, and merges their products.

    Attributes:
        layout: of the factors, A and B of each layer in turn.
        monitor: is told of every merge.
    """

    monitor: UpdateMonitor | None = None

    def __init__(self, layers: Sequence[LayerShards], world: World, into: MergeTarget) -> None:
        """Exchange who holds what (one all-gather); ``layers`` in the order of every later call."""
        self.world, self.into = world, into
        self.layout = Layout.of(factor_shards(layers), world.device)

    @torch.no_grad()
    def __call__(
        self,
        layers: Sequence[LayerShards],
        weights: Tensor,
        clock: Clock,
        which: Sequence[int] | None = None,
    ) -> None:
        """Add ``s·A diag(weights) Bᵀ``: A and B whole by all-gathers in buckets; W never travels.

        Args:
            weights: (layers, r) float64 on the CPU.
            which: the layers to merge, by number, the same on every rank; None: all.
        """
        shards = factor_shards(layers)
        clock.begin("gather")
        # One copy to the device for all layers: a copy each would wait for it each time.
        on_device = weights.to(self.world.device)
        if self.monitor:
            clock.begin("monitor")
            scalings = torch.tensor([[layer.scaling] for layer in layers]).to(on_device)
            self.monitor.add(layers, scalings * on_device)
        chosen = range(len(layers)) if which is None else which
        self.into.make_room(layers, chosen, clock)
        for bucket in self.layout.buckets([(2 * i, 2 * i + 1) for i in chosen]):
            clock.begin("gather")
            gathered = self.layout.gather(shards, bucket)
            clock.begin("merge")
            for i, a, b in zip(bucket[::2], gathered[0::2], gathered[1::2], strict=True):
                self.into.add(layers[i // 2], a * on_device[i // 2].to(a), b)
