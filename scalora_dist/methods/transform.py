"""What a method does with gradients, factors and weights around the optimizer's step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scalora_dist.engines.base import Engine
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.profiling.clock import Clock


@dataclass(frozen=True)
class Report:
    """What one transform did.

    Attributes:
        applied: False when it could not be done with finite numbers. Then nothing was changed, and
            the step must be discarded.
        grad_norm: of the gradients as the optimizer sees them, over all layers and ranks, times the
            loss scale. None from a transform that changes gradients alone: then it is measured.
        grad_norm_before: of the gradients as they came, likewise.
        details: what metrics.jsonl says of it.
    """

    applied: bool
    grad_norm: float | None = None
    grad_norm_before: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


class Transform(ABC):
    """Runs on this rank's shards after the last backward and before the optimizer's step.

    Attributes:
        name: under which metrics.jsonl reports it.
    """

    name: str

    def due(self, steps_taken: int) -> bool:
        """Whether the step that follows ``steps_taken`` steps is transformed."""
        return True

    def refuse(self, layers: Sequence[LayerShards]) -> Report:
        """The report of a step whose numbers are not finite: nothing was changed."""
        return Report(applied=False)

    @abstractmethod
    def __call__(self, layers: Sequence[LayerShards], clock: Clock) -> Report:
        """Transform ``layers`` in place, or leave all as they were (``applied`` False).

        Args:
            clock: is told as each part of the work begins.
        """


class Restart(ABC):
    """Changes factors, moments and weights between two steps.

    Attributes:
        name: under which metrics.jsonl reports it.
    """

    name: str

    @abstractmethod
    def due(self, steps_taken: int) -> bool:
        """Whether it runs after ``steps_taken`` steps."""

    @abstractmethod
    def __call__(self, engine: Engine, steps_taken: int, clock: Clock) -> None:
        """Restart; a collective.

        Args:
            clock: is told as each part of the work begins.
        """
