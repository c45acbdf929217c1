"""Interfaces for a method's work before the optimizer's step and between two steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scalora_dist.engines.base import Engine
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.profiling.clock import Clock


@dataclass(frozen=True)
class TransformReport:
    """What one transform did.

    Attributes:
        applied: False if some number was not finite. Then nothing was changed, and the step must
            be discarded.
        grad_norm: norm of the gradients that the optimizer sees, over all layers and ranks, times
            the loss scale. NaN where the transform was not applied.
        grad_norm_before: the same norm before the transform.
        details: metrics of the transform for metrics.jsonl.
    """

    applied: bool
    grad_norm: float = math.nan
    grad_norm_before: float = math.nan
    details: dict[str, Any] = field(default_factory=dict)


class Transform(ABC):
    """Runs on this rank's shards after the last backward and before the optimizer's step.

    Attributes:
        name: the key of its metrics in metrics.jsonl.
    """

    name: str

    def due(self, steps_taken: int) -> bool:
        """Whether the step that follows ``steps_taken`` steps is transformed."""
        return True

    def refuse(self, layers: Sequence[LayerShards]) -> TransformReport:
        """The report of a step whose numbers are not finite: nothing was changed."""
        return TransformReport(applied=False)

    @abstractmethod
    def __call__(self, layers: Sequence[LayerShards], clock: Clock) -> TransformReport:
        """Transform ``layers`` in place, or change nothing (``applied`` False). A collective.

        Args:
            clock: its ``begin`` is called as each part of the work begins.
        """


class Restart(ABC):
    """Changes factors, moments and weights between two steps.

    Attributes:
        name: the key of its metrics in metrics.jsonl.
    """

    name: str

    @abstractmethod
    def due(self, steps_taken: int) -> bool:
        """Whether it runs after ``steps_taken`` steps."""

    @abstractmethod
    def __call__(self, engine: Engine, steps_taken: int, clock: Clock) -> None:
        """Restart. A collective.

        Args:
            clock: its ``begin`` is called as each part of the work begins.
        """
