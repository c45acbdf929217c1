"""The few samples whose gradient a start takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor

from scalora_dist.data.collate import PaddedExamples
from scalora_dist.distributed.world import World
from scalora_dist.modeling.loss import Targets


class SamplePass:
    """One pass over this rank's share of the samples: their losses, normalised as a step's are.

    The samples depend on the seed alone, and go one by one: activations then take less than a
    step's, which leaves room for gradients. The losses of all ranks add up to the mean over all
    target tokens; a rank that has none left gets an example without targets, so that all have
    equally many.
    """

    def __init__(
        self,
        loss: Callable[[dict[str, Tensor]], Targets],
        data: Dataset,
        collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
        world: World,
        *,
        count: int,
        seed: int,
    ) -> None:
        """
        Args:
            loss: of a batch of token ids, attention mask and labels, summed over its targets.
            count: of the samples, over all ranks; at most all examples are taken.
        """
        self.loss = loss
        self.collate = collate
        self.world = world
        self.examples = PaddedExamples(data)
        chosen = np.random.default_rng(seed).permutation(len(data))[:count]
        self.targets = int(np.asarray(data["target_tokens"])[chosen].sum())
        padded = [*chosen.tolist(), *[None] * (-len(chosen) % world.size)]
        self.mine = padded[world.rank :: world.size]

    def __call__(self) -> Iterator[Tensor]:
        for i in self.mine:
            tensors = self.collate([self.examples[i]])
            tensors = {name: tensor.to(self.world.device) for name, tensor in tensors.items()}
            yield self.loss(tensors).loss / self.targets
