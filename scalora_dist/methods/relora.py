"""ReLoRA (arXiv 2307.05695): periodically merges A and B into W and re-initializes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scalora_dist.core import host
from scalora_dist.engines.base import Engine
from scalora_dist.engines.layer_shards import LayerShards, factor_shards, moment_shards
from scalora_dist.layers.lora_init import lora_init
from scalora_dist.methods.merger import Merger
from scalora_dist.methods.transform import Restart
from scalora_dist.profiling.clock import Clock


class ReloraRestart(Restart):
    """Every ``interval`` steps: W += s·A Bᵀ, A = 0, B is drawn again, small moments become 0.

    The model computes the same function afterwards. All ranks draw the same B. The moments m and v
    become 0 where |m| is in the smallest ``prune`` share of its parameter (section 3 of the paper).
    With ``prune`` 1 all moments become 0.
    """

    name = "restart"

    def __init__(self, merger: Merger, *, interval: int, prune: float, seed: int) -> None:
        self.merger = merger
        self.interval = interval
        self.prune = prune
        self.seed = seed

    def due(self, steps_taken: int) -> bool:
        return steps_taken > 0 and steps_taken % self.interval == 0

    def __call__(self, engine: Engine, steps_taken: int, clock: Clock) -> None:
        with engine.writing():
            layers = engine.layer_shards(gradients=False)
            rank = layers[0].A.shape[1]
            self.merger(layers, torch.ones(len(layers), rank, dtype=torch.float64), clock)
            clock.begin("factors")
            self._draw(layers, steps_taken)
            self._prune(layers)

    def _draw(self, layers: Sequence[LayerShards], steps_taken: int) -> None:
        """Set A to 0, and B to new values: one copy to the device per batch."""
        factors, layout = factor_shards(layers), self.merger.layout

        def drawn(i: int) -> Tensor:
            if i % 2 == 0:
                return torch.zeros(factors[i].local.numel())
            layer = layers[i // 2]
            m, (n, rank) = layer.A.shape[0], layer.B.shape
            name = f"{layer.name} after {steps_taken} steps"
            _, b = lora_init(name, m, n, rank, seed=self.seed, dtype=torch.float32)
            return factors[i].own(b)

        for batch in layout.batches:
            values = torch.cat([drawn(i) for group in batch for i in group.which])
            values = host.to_device(values, factors[0].local.device)
            layout.unpack(batch, (values, factors))

    def _prune(self, layers: Sequence[LayerShards]) -> None:
        """Set small moments to 0. First moments are gathered bucket by bucket.

        Each m is gathered in full, as factors are for a merge, because its threshold is one number
        for all ranks. v is set to 0 where m is. If v were pruned by its own size, some m could stay
        without its v, and the step there would be m/ε.
        """
        moments = moment_shards(layers)
        layout = self.merger.layout
        for bucket in layout.buckets([(i,) for i in range(len(moments[0]))]):
            for indices, stack in layout.gather_stacks(moments[0], bucket):
                here = moments[0][indices[0]].local.device
                thresholds = host.to_device(_smallest(stack.flatten(1), self.prune), here)
                for i, threshold in zip(indices, thresholds.unbind(), strict=True):
                    kept = moments[0][i].local.abs() > threshold
                    for shards in moments:
                        shards[i].local.mul_(kept)


def _smallest(matrices: Tensor, share: float) -> Tensor:
    """For each row, the absolute value that a ``share`` of the entries does not exceed.

    −1 for no entries.
    """
    count = int(share * matrices.shape[1])
    if not count:
        return matrices.new_full((len(matrices),), -1.0)
    return matrices.abs().kthvalue(count, dim=1).values


def warmed_up_again(
    rate: Callable[[int], float], *, interval: int, warmup_steps: int
) -> Callable[[int], float]:
    """``rate`` with a linear warm-up after each restart, from 1/(warmup_steps + 1) up to 1.

    Args:
        rate: the schedule: steps taken → factor on the learning rate.
        interval: steps between restarts.
        warmup_steps: steps of warm-up after each restart.
    """

    def warmed(steps: int) -> float:
        since = steps % interval if steps >= interval else warmup_steps
        return rate(steps) * min(1.0, (since + 1) / (warmup_steps + 1))

    return warmed
