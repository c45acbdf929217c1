"""The few samples whose gradient a start takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn

from scalora_dist.data.collate import PaddedExamples
from scalora_dist.loss import summed_cross_entropy
from scalora_dist.world import World


class SamplePass:
    """One pass over this rank's share of the samples: their losses, normalised as a step's are.

    The samples depend on the seed alone. The losses of all ranks and micro-batches add up to the
    mean over all target tokens; a rank that has none left gets an example without targets, so that
    all have equally many micro-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
        world: World,
        *,
        count: int,
        micro_batch_size: int,
        seed: int,
    ) -> None:
        """
        Args:
            count: of the samples, over all ranks; at most all examples are taken.
            micro_batch_size: examples of one forward of one rank.
        """
        self.model, self.collate, self.world = model, collate, world
        self.examples = PaddedExamples(data)
        chosen = np.random.default_rng(seed).permutation(len(data))[:count]
        self.targets = int(np.asarray(data["target_tokens"])[chosen].sum())
        each = micro_batch_size * world.size
        padded = [*chosen.tolist(), *[None] * (-len(chosen) % each)]
        starts = range(world.rank * micro_batch_size, len(padded), each)
        self.batches = [padded[start : start + micro_batch_size] for start in starts]

    def __call__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            tensors = self.collate([self.examples[i] for i in batch])
            tensors = {name: tensor.to(self.world.device) for name, tensor in tensors.items()}
            labels = tensors.pop("labels")
            logits = self.model(**tensors, use_cache=False).logits
            yield summed_cross_entropy(logits, labels) / self.targets
