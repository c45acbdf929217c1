"""Where merged products of A and B are stored: the interface, and the weights W themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scalora_dist.core.split_precision import MergeRounding, add_low_rank_, zero_low_half
from scalora_dist.engines.layer_shards import LayerShards
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
        """Add ``s·left rightᵀ`` to the frozen part of a layer. Local, no collective.

        Args:
            left: the full left factor, (m, r) float32.
            right: the full right factor, (n, r) float32.
        """

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

    def add(self, layer: LayerShards, left: Tensor, right: Tensor) -> None:
        add_low_rank_(
            layer.W, left * layer.scaling, right, self.low_halves.get(f"{layer.name}.weight")
        )
