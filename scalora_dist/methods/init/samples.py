"""The few samples whose gradients an initialization uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from datasets import Dataset
from torch import Tensor

from scalora_dist.data.collate import Collator, PaddedExamples
from scalora_dist.data.micro_batch import MicroBatch
from scalora_dist.distributed.world import World
from scalora_dist.modeling.loss import Targets


class SamplePass:
    """One pass over this rank's share of the samples. Yields their losses, normalised as in a step.

    The samples depend only on the seed. They are processed one at a time: then activations take
    less memory than in a step, which leaves room for gradients. The losses of all ranks sum to the
    mean over all target tokens. A rank that has no samples left gets an example without targets, so
    that all ranks yield equally many losses.
    """

    def __init__(
        self,
        loss: Callable[[MicroBatch], Targets],
        data: Dataset,
        collate: Collator,
        world: World,
        *,
        count: int,
        seed: int,
    ) -> None:
        """
        Args:
            loss: the loss of a batch, summed over its targets.
            data: the tokenized examples to choose from.
            collate: makes a padded batch of examples.
            world: the ranks.
            count: number of samples over all ranks. If there are fewer examples, all are taken.
            seed: the seed of the choice.
        """
        self.loss = loss
        self.collate = collate
        self.world = world
        self.examples = PaddedExamples(data)
        chosen = np.random.default_rng(seed).permutation(len(data))[:count]
        self.targets = int(np.asarray(data["target_tokens"][:])[chosen].sum())
        padded = [*chosen.tolist(), *[None] * (-len(chosen) % world.size)]
        self.mine = padded[world.rank :: world.size]

    def __call__(self) -> Iterator[Tensor]:
        return map(self._loss, self.mine)

    def longest(self) -> Iterator[Tensor]:
        """The loss of this rank's longest sample alone, which needs the most memory."""
        length = {i: len(self.examples[i]["input_ids"]) for i in self.mine}
        yield self._loss(max(self.mine, key=length.__getitem__))

    def _loss(self, index: int | None) -> Tensor:
        batch = self.collate([self.examples[index]]).to(self.world.device)
        return self.loss(batch).loss / self.targets
