"""What merges are added to: the weights themselves, or what stands for them."""

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
    """What merges are added to, and what that leaves.

    Attributes:
        low_halves: {parameter: int16 remainders of its 16-bit values}; sharded like it.
    """

    low_halves: Mapping[str, Tensor]

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
