"""Merges products of A and B of all layers into W, or into the carry beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from scalora_dist.config.method import MergeRounding
from scalora_dist.core import host, host_pieces
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.layout import Layout
from scalora_dist.core.split_precision import add_low_rank_, zero_low_half
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards, factor_shards
from scalora_dist.profiling.clock import Clock


class MergeTarget(ABC):
    """Stores merged products of A and B, with state for reports and checkpoints.

    Attributes:
        low_halves: {parameter: low halves of its 16-bit values}, int16, sharded like the parameter.
    """

    low_halves: Mapping[str, Tensor]

    def make_room(  # noqa: B027
        self, layers: Sequence[LayerShards], which: Sequence[int], clock: Clock
    ) -> None:
        """Prepare one ``add`` to each of the layers ``which``. Called on every rank."""

    @abstractmethod
    def add(self, layer: LayerShards, left: Tensor, right: Tensor) -> None:
        """Add ``left rightᵀ`` to the frozen part of a layer. Local, no collective.

        Where it is in the host's memory, it is complete after ``host_pieces.wait()``.

        Args:
            left: the full left factor times ``factor``, (m, r) float32, contiguous.
            right: the full right factor, (n, r) float32, contiguous.
        """

    @abstractmethod
    def factor(self, layer: LayerShards) -> float:
        """What to multiply A by, so that ``A Bᵀ`` is what is added to the frozen part."""

    def finish(self, layers: Sequence[LayerShards]) -> None:  # noqa: B027
        """Called once, after the last merge of a run."""

    def report(self) -> dict[str, Any]:
        """Metrics of the merges since the last call, for metrics.jsonl."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Metrics of the whole run, for summary.json."""
        return {}

    def state(self) -> dict[str, Any]:
        """State for a checkpoint besides tensors. The same on every rank."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore what ``state()`` returned."""


class IntoWeights(MergeTarget):
    """Adds merges to W itself, on the range of W that this rank owns."""

    def __init__(self, layers: Sequence[LayerShards], rounding: MergeRounding) -> None:
        self.low_halves: dict[str, Tensor] = {}
        if rounding == "split":
            self.low_halves = {
                f"{layer.name}.weight": zero_low_half(layer.W)
                for layer in layers
                if layer.W.local.dtype != torch.float32
            }

    def factor(self, layer: LayerShards) -> float:
        return layer.scaling

    def add(self, layer: LayerShards, left: Tensor, right: Tensor) -> None:
        low = self.low_halves.get(f"{layer.name}.weight")
        add_low_rank_(layer.W, left, right, low, wait=False)


class Monitor(Protocol):
    """Follows the merges (``RankMonitor``)."""

    def add(self, layers: Sequence[LayerShards], weights: Tensor) -> None:
        """Called before ``W += A diag(weights) Bᵀ``, with weights (layers, r) on the CPU."""


class Merger:
    """Gathers A and B of each layer and merges their products.

    Attributes:
        world: the ranks.
        target: what the products are added to.
        layout: which rank holds which range of A and B, for each layer in turn.
        monitor: is called before every merge, or None.
    """

    monitor: Monitor | None = None

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

        A and B are gathered in full, bucket by bucket of layers. W is never sent.

        Args:
            weights: one factor per column, (layers, r) float64 on the CPU.
            which: numbers of the layers to merge, the same on every rank. None: all layers.
        """
        shards = factor_shards(layers)
        chosen = range(len(layers)) if which is None else which
        if self.monitor:
            clock.begin("monitor")
            scalings = torch.tensor([[layer.scaling] for layer in layers], dtype=weights.dtype)
            self.monitor.add(layers, scalings * weights)
        self.target.make_room(layers, chosen, clock)
        clock.begin("gather")
        factors = torch.tensor([[self.target.factor(layer)] for layer in layers])
        table = (factors * weights).to(torch.promote_types(shards[0].local.dtype, torch.float32))
        table = host.to_device(table, self.world.device)
        for bucket in self.layout.buckets([(2 * i, 2 * i + 1) for i in chosen]):
            clock.begin("gather")
            whole = self._weighted(shards, bucket, table)
            clock.begin("merge")
            for i in bucket[::2]:
                self.target.add(layers[i // 2], whole[i], whole[i + 1])
            del whole  # before the next bucket is gathered
        host_pieces.wait()

    def _weighted(
        self, shards: Sequence[FlatShard], bucket: Sequence[int], table: Tensor
    ) -> dict[int, Tensor]:
        """The full A, its columns multiplied by the layer's row of ``table``, and the full B.

        By index in ``shards``.
        """
        found: dict[int, Tensor] = {}
        # A before B, so that of each shape the first matrices are those to multiply.
        for indices, stack in self.layout.gather_stacks(shards, [*bucket[::2], *bucket[1::2]]):
            layers = [i // 2 for i in indices if i % 2 == 0]
            if layers:
                rows = host.to_device(torch.tensor(layers), table.device)
                stack[: len(layers)].mul_(table.index_select(0, rows)[:, None])
            found |= dict(zip(indices, stack.unbind(), strict=True))
        return found
