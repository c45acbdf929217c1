"""What an engine keeps on one rank, for a plan made before it exists."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scalora_dist.planning.trace import Event

Part = Literal["base", "carry", "adapters"]


@dataclass(frozen=True)
class Weight:
    """One parameter of a model that has no storage.

    Attributes:
        module: the name of the module that owns it.
        itemsize: bytes of an element as an engine computes with it. stored: as it keeps it.
        part: of the model, a frozen carry, or what the method added.
        merged: whether a method adds to it and keeps its low halves.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    itemsize: int
    stored: int
    trained: bool
    part: Part
    merged: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclass
class Held:
    """Bytes of one rank, between steps and all through them.

    Attributes:
        device: by part. host: by part, of engines that offload.
        during_step: more on the device while the optimizer steps.
    """

    device: dict[str, float]
    host: dict[str, float]
    during_step: float = 0.0


@dataclass(frozen=True)
class Message:
    """What one rank receives from the others of its group in a step.

    Attributes:
        received: bytes. ranks: of the group.
        alike: whether all GPUs of a node need the same, which then comes to the node once.
    """

    what: str
    received: float
    ranks: int
    alike: bool = True


class Residency(ABC):
    """One engine on so many ranks.

    Attributes:
        ranks: that a weight is cut up over, or gathered from.
        world: all of them.
    """

    def __init__(self, world: int) -> None:
        self.world = self.ranks = world

    def see(self, blocks: Sequence[str]) -> None:  # noqa: B027
        """Be told the names of the model's decoder blocks."""

    @abstractmethod
    def share(self, weight: Weight) -> int:
        """Elements of a frozen weight that one rank keeps, the fullest one's."""

    @abstractmethod
    def held(self, weights: Sequence[Weight], micro_batches: int) -> Held:
        """Weights, masters, moments, gradients, buffers."""

    def gathers(self, weights: Sequence[Weight], events: Sequence[Event]) -> list[float]:
        """Bytes of gathered weights during each event of a micro-batch."""
        return [0.0] * len(events)

    @abstractmethod
    def wire(
        self, weights: Sequence[Weight], events: Sequence[Event], micro_batches: int
    ) -> list[Message]:
        """What travels for this engine's own sake in a step, the rescale's messages apart."""

    def kept_parts(self, weights: Sequence[Weight]) -> dict[str, float]:
        """Bytes of the frozen weights and their low halves on one rank, by part."""
        parts: dict[str, float] = {}
        for weight in weights:
            if not weight.trained:
                kept = self.share(weight)
                parts[weight.part] = parts.get(weight.part, 0) + kept * weight.stored
                if weight.merged and weight.stored == 2:
                    parts["low halves"] = parts.get("low halves", 0) + 2 * kept
        return parts


class LocalResidency(Residency):
    """One process: everything once, A and B in fp32."""

    def __init__(self) -> None:
        super().__init__(1)

    def share(self, weight: Weight) -> int:
        return weight.numel

    def held(self, weights: Sequence[Weight], micro_batches: int) -> Held:
        trained = sum(weight.numel for weight in weights if weight.trained)
        kept = self.kept_parts(weights)
        return Held(
            {**kept, "adapters": 4 * trained, "moments": 8 * trained, "gradients": 4 * trained}, {}
        )

    def wire(
        self, weights: Sequence[Weight], events: Sequence[Event], micro_batches: int
    ) -> list[Message]:
        return []


def others(ranks: int) -> float:
    """The share of a whole that a rank does not have itself."""
    return (ranks - 1) / ranks
