"""ReLoRA (arXiv 2307.05695): from time to time merge the factors into W and start them anew."""

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


class Restarts(Restart):
    """After every ``interval`` steps: W += s·A Bᵀ, A = 0, B drawn anew, most of the moments zero.

    The model's function stays as it is. B is drawn alike on all ranks. Where m is among the
    ``prune`` share that is smallest in size, m and v become 0 (section 3 of the paper; 1: all do).
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
        """Each m whole by turns, as factors are for a merge: its threshold is one number.

        v goes where m goes. Alone it would lose other entries, and an m that stayed without its v
        would make a step of m/ε.
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
    """The size that ``share`` of the entries do not exceed."""
    count = int(share * whole.numel())
    return float(whole.abs().flatten().kthvalue(count).values) if count else -1.0


def warmed_up_again(
    rate: Callable[[int], float], *, interval: int, warmup_steps: int
) -> Callable[[int], float]:
    """``rate`` (the schedule's factor after so many steps), rising from 0 after each restart."""

    def warmed(steps: int) -> float:
        since = steps % interval if steps >= interval else warmup_steps
        return rate(steps) * min(1.0, (since + 1) / (warmup_steps + 1))

    return warmed
