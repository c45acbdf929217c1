"""ReLoRA (arXiv 2307.05695): periodically merges A and B into W and re-initializes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scalora_dist.engines.base import Engine
from scalora_dist.engines.layer_shards import LayerShards
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
            for layer in layers:
                m, n = layer.A.shape[0], layer.B.shape[0]
                seed_name = f"{layer.name} after {steps_taken} steps"
                a, b = lora_init(seed_name, m, n, rank, seed=self.seed, dtype=torch.float32)
                layer.A.write_(a)
                layer.B.write_(b)
            self._prune(layers)

    def _prune(self, layers: list[LayerShards]) -> None:
        """Set small moments to 0: one all-gather per bucket of first moments.

        Each m is gathered in full, as factors are for a merge, because its threshold is one number
        for all ranks. v is set to 0 where m is. If v were pruned by its own size, some m could stay
        without its v, and the step there would be m/ε.
        """
        moments = [pair for layer in layers for pair in (layer.moments_A, layer.moments_B)]
        firsts = [m for m, _ in moments]
        layout = self.merger.layout
        for bucket in layout.buckets([(i,) for i in range(len(moments))]):
            for i, whole in zip(bucket, layout.gather(firsts, bucket), strict=True):
                threshold = _smallest(whole, self.prune)
                kept = firsts[i].local.abs() > threshold
                for moment in moments[i]:
                    moment.local.mul_(kept)


def _smallest(whole: Tensor, share: float) -> float:
    """The absolute value that a ``share`` of the entries does not exceed. −1 for no entries."""
    count = int(share * whole.numel())
    return float(whole.abs().flatten().kthvalue(count).values) if count else -1.0


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
