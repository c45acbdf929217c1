"""What a method does with gradients, factors and weights between backward and optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scalora_dist.engines.base import LayerShards
from scalora_dist.profiling.clock import Clock


@dataclass(frozen=True)
class Report:
    """What one transform did.

    Attributes:
        applied: False when it could not be done with finite numbers: then nothing was changed and
            the step must be discarded.
        grad_norm_before, grad_norm: of the gradients as they came and as the optimizer sees them,
            over all layers and ranks (loss scale included). NaN, from a transform that changes
            gradients alone: to be measured.
        record: what metrics.jsonl says of it.
    """

    applied: bool
    grad_norm_before: float = float("nan")
    grad_norm: float = float("nan")
    record: dict[str, Any] = field(default_factory=dict)


class Transform(ABC):
    """Runs on this rank's shards after the last backward and before the optimizer's step.

    Attributes:
        name: under which metrics.jsonl reports it.
    """

    name: str

    def due(self, steps_taken: int) -> bool:
        """Whether the step after so many that were taken is transformed."""
        return True

    def refuse(self, layers: Sequence[LayerShards]) -> Report:
        """What to report of a step whose numbers are not finite: nothing was changed."""
        return Report(applied=False)

    @abstractmethod
    def __call__(self, layers: Sequence[LayerShards], clock: Clock) -> Report:
        """Transform ``layers`` in place, or leave all as they were (``applied`` False).

        Args:
            clock: is told of each part that begins.
        """
