"""The interface that predicts an engine's memory and messages on one rank, for plans."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scalora_dist.planning.ranges import Sharding
from scalora_dist.planning.trace import Event

Part = Literal["base", "carry", "adapters"]


@dataclass(frozen=True)
class Weight:
    """Facts about one parameter of a model without storage.

    Attributes:
        name: the parameter's name.
        module: the name of the module that owns it.
        shape: its full shape.
        itemsize: bytes of an element in the engine's compute dtype.
        stored: bytes of an element in the dtype that the engine stores.
        trained: whether it is trained.
        part: the base model, a frozen carry, or the other parameters that the method added.
        merged: whether a method merges into it.
        low: bytes of an element's low half, which is kept beside it; 0 if there is none.
        saved: whether checkpoints hold it.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    itemsize: int
    stored: int
    trained: bool
    part: Part
    merged: bool = False
    low: int = 0
    saved: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, cols) of a 2-D weight."""
        rows, cols = self.shape
        return rows, cols

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclass
class Held:
    """Memory that one rank needs at all times, during steps and between them.

    Attributes:
        device: {part: bytes} on the device.
        host: {part: bytes} on the host, if the engine offloads.
        during_step: additional bytes on the device during the optimizer's step.
    """

    device: dict[str, float]
    host: dict[str, float]
    during_step: float = 0.0


@dataclass(frozen=True)
class Message:
    """Data that one rank receives from the other ranks of its group in a step.

    Attributes:
        what: the kind of data, as shown to the user.
        received: bytes that one rank receives.
        ranks: number of ranks in the group.
        alike: whether all GPUs of a node need the same data, which then enters the node once.
        uploaded: bytes of what this rank sends that it first copies from the host's memory.
        summed: whether it is no all-gather: a sum over the ranks, or parts of rows to add.
    """

    what: str
    received: float
    ranks: int
    alike: bool = True
    uploaded: float = 0.0
    summed: bool = False


class Residency(ABC):
    """Predicts what one engine keeps on a rank and sends between ranks.

    Attributes:
        ranks: number of ranks over which a weight is sharded, or from which it is gathered.
        world: world size.
        sharding: how the trained parameters are cut.
        steps_a_buffer: whether the optimizer steps one buffer, and not each parameter (ZeRO).
    """

    sharding: Sharding = "local"
    steps_a_buffer = False

    def __init__(self, world: int) -> None:
        self.world = self.ranks = world

    @property
    def cuts_a_buffer(self) -> bool:
        """Whether the trained parameters are cut as one buffer (ZeRO-1 and 2)."""
        return self.sharding == "zero1"

    def see(self, blocks: Sequence[str]) -> None:  # noqa: B027
        """Take the names of the model's decoder blocks. Called before the other methods."""

    @abstractmethod
    def share(self, weight: Weight) -> int:
        """Number of elements of a frozen weight on the rank that keeps most of it."""

    @abstractmethod
    def held(self, weights: Sequence[Weight], micro_batches: int) -> Held:
        """Memory of weights, masters, moments, gradients and the engine's buffers.

        Args:
            weights: all parameters of the model.
            micro_batches: number of micro-batches in a step.
        """

    def gathers(self, weights: Sequence[Weight], events: Sequence[Event]) -> list[float]:
        """Bytes of gathered weights on a rank, from each event of a micro-batch to the next."""
        return [0.0] * len(events)

    @abstractmethod
    def wire(
        self, weights: Sequence[Weight], events: Sequence[Event], micro_batches: int
    ) -> list[Message]:
        """Messages of this engine in a step, without those of the rescale."""

    def saved(self, weight: Weight) -> float:
        """Elements of a matrix that a rank saves, on the rank that saves most of it.

        Ranks that hold the same elements save an equal share of them each.
        """
        return weight.numel / self.world

    def kept_parts(self, weights: Sequence[Weight]) -> dict[str, float]:
        """Memory of the frozen weights and their low halves on one rank, {part: bytes}."""
        parts: dict[str, float] = {}
        for weight in weights:
            if not weight.trained:
                kept = self.share(weight)
                parts[weight.part] = parts.get(weight.part, 0) + kept * weight.stored
                if weight.low:
                    parts["low halves"] = parts.get("low halves", 0) + kept * weight.low
        return parts


class LocalResidency(Residency):
    """One process, which keeps everything. A and B are in fp32."""

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
    """The fraction of a full tensor that a rank does not have, if each rank has an equal part."""
    return (ranks - 1) / ranks
