"""Selects the examples of step k: a function of the seed, the same for all ranks and layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from scalora_dist.core.arithmetic import ceil_div


@lru_cache(maxsize=2)  # a step may span two epochs
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng((seed, epoch)).permutation(num_examples)
    order.flags.writeable = False  # the cache shares it
    return order


class GlobalBatches:
    """The endless sequence of global batches.

    Each epoch has one permutation of the examples. Step k holds positions
    ``[k * GB, (k + 1) * GB)`` of the concatenated permutations, GB = global batch size. So every
    epoch visits each example once, at any batch size.
    """

    def __init__(self, target_tokens: Sequence[int], global_batch_size: int, seed: int) -> None:
        """
        Args:
            target_tokens: number of target tokens of each example, ints, shape (examples,): the
                column that `tokenize_examples` adds.
            global_batch_size: examples per step.
            seed: seed of the permutations.

        Raises:
            ValueError: there are no examples, or the batch size is below 1.
        """
        if len(target_tokens) == 0 or global_batch_size < 1:
            raise ValueError("GlobalBatches needs examples and a batch size of at least 1")
        self.global_batch_size = global_batch_size
        # Without [:], numpy would read a column of `datasets` value by value, ten times slower.
        self._counts = np.asarray(target_tokens[:], dtype=np.int64)
        self._seed = seed

    def indices(self, step: int) -> list[int]:
        """Indices of the examples of step `step`, in order; as many as the global batch size."""
        num_examples = len(self._counts)
        position, end = step * self.global_batch_size, (step + 1) * self.global_batch_size
        found: list[int] = []
        while position < end:
            epoch, offset = divmod(position, num_examples)
            part = _permutation(num_examples, self._seed, epoch)[offset : offset + end - position]
            found += part.tolist()
            position += len(part)
        return found

    def target_tokens(self, step: int) -> int:
        """Number of target tokens of the global batch of a step. No communication."""
        return int(self._counts[self.indices(step)].sum())


class RankBatches(Sampler[list[int]]):
    """One rank's micro-batches, for ``DataLoader(batch_sampler=...)``. Endless from `start_step`.

    Micro-major order: with micro-batch size b and w ranks, micro-batch j of rank p is
    ``indices(step)[(j * w + p) * b : (j * w + p + 1) * b]``. So a step's micro-batches are the same
    on 2 ranks without accumulation and on 1 rank with accumulation 2.
    """

    def __init__(
        self,
        batches: GlobalBatches,
        *,
        micro_batch_size: int,
        rank: int,
        world: int,
        start_step: int = 0,
    ) -> None:
        if batches.global_batch_size % (micro_batch_size * world):
            raise ValueError(
                f"global batch size {batches.global_batch_size} is no multiple of "
                f"{micro_batch_size} examples x {world} ranks"
            )
        self.batches = batches
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world = world
        self.start_step = start_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        stride = self.micro_batch_size * self.world
        while True:
            indices = self.batches.indices(step)
            for first in range(self.rank * self.micro_batch_size, len(indices), stride):
                yield indices[first : first + self.micro_batch_size]
            step += 1


def eval_batches(
    num_examples: int, batch_size: int, rank: int, world: int
) -> list[list[int | None]]:
    """One pass over all examples: every rank has the same number of equally large batches.

    Under ZeRO-3 each forward is a collective, so all ranks need the same number of batches. None
    is the index of a padding example without targets (see `collate.PaddedExamples`).
    """
    stride = batch_size * world
    return [
        [i if i < num_examples else None for i in range(first, first + batch_size)]
        for first in range(rank * batch_size, ceil_div(num_examples, stride) * stride, stride)
    ]
