"""Looks during a ScaLoRA run whether the conditions of the paper's theorems hold.

* Theorem 1 assumes rank(∇ℓ) ≥ 2r (figure 2(c)). ∇ℓ of a layer's frozen weight is computed in a pass
  of its own over the step's batch.
* Theorem 5 needs a column solution z = H⁺λ that is positive (figure 2(d)). Without it the method
  takes scalar scaling. The grams are those that the rescale itself solves from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from scalora_dist.config.options import Options
from scalora_dist.core.rank_sketch import RELATIVE_THRESHOLD
from scalora_dist.core.scale_solver import Rule, solve
from scalora_dist.data.micro_batch import MicroBatch
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.errors import UserError
from scalora_dist.methods.init.gradients import weight_gradients
from scalora_dist.methods.init.groups import Budget
from scalora_dist.methods.rank_monitor import spread_out
from scalora_dist.methods.scalora import Rescaler
from scalora_dist.methods.transform import Transform, TransformReport
from scalora_dist.profiling.clock import Clock
from scalora_dist.training.feed import MicroBatches
from scalora_dist.training.trainer import Trainer

BUDGET = Budget(device=512 * 2**20)  # for gradients of frozen weights at one time


@dataclass(frozen=True)
class GradientRank:
    """The spectrum of ∇ℓ of one layer's weight at one step.

    Attributes:
        step: number of the step, from 0.
        layer: name of the layer.
        size: min(m, n).
        rank: numerical rank, with the tolerance of ``numerical_rank``.
        stable_rank: ‖G‖_F² / ‖G‖₂².
    """

    step: int
    layer: str
    size: int
    rank: int
    stable_rank: float


@dataclass(frozen=True)
class ColumnShare:
    """For how many of the layers the column solution of one step holds.

    Attributes:
        step: number of the step, from 0; skipped steps do not count.
        positive: share of layers where all of z that is not free is positive (Theorem 5).
        bounded: share of layers where it is also within ``scale_bounds``.
    """

    step: int
    positive: float
    bounded: float


class ObservedRescaler(Transform):
    """Notes how often the column solution holds, then lets the rescaler work."""

    name = Rescaler.name

    def __init__(self, rescaler: Rescaler) -> None:
        self.rescaler = rescaler
        self.step = 0
        self.shares: list[ColumnShare] = []

    def due(self, steps_taken: int) -> bool:
        self.step = steps_taken
        return self.rescaler.due(steps_taken)

    def refuse(self, layers: Sequence[LayerShards]) -> TransformReport:
        return self.rescaler.refuse(layers)

    def __call__(self, layers: Sequence[LayerShards], clock: Clock) -> TransformReport:
        gram_a, gram_b = self.rescaler.grams(layers)
        report = self.rescaler(layers, clock)
        if report.applied:
            self.shares.append(
                ColumnShare(
                    self.step,
                    self._share(gram_a, gram_b, layers[0].scaling, None),
                    self._share(gram_a, gram_b, layers[0].scaling, self.rescaler.bounds),
                )
            )
        return report

    def _share(
        self, gram_a: Tensor, gram_b: Tensor, scaling: float, bounds: tuple[float, float] | None
    ) -> float:
        scales = solve(
            gram_a,
            gram_b,
            scaling=scaling,
            eta_lipschitz=self.rescaler.eta_lipschitz,
            rule="paper",
            bounds=bounds,
        )
        return float((scales.rule == int(Rule.COLUMN)).double().mean())


class ObservingTrainer(Trainer):
    """A trainer that also measures the ranks of ∇ℓ, and watches the rescaler.

    Attributes:
        observed: the watched rescaler.
        gradients: what was measured so far.
    """

    def __init__(self, options: Options, world: World, *, every: int, count: int) -> None:
        """
        Args:
            every: measure gradients before steps 0, ``every``, 2·``every`` …
            count: number of layers whose gradients are measured.

        Raises:
            UserError: as ``Trainer``; or the method is not ScaLoRA, or there is more than one rank.
        """
        if options.method.name != "scalora" or world.size > 1:
            raise UserError("scalora reproduce figure2 takes --method scalora, in one process")
        super().__init__(options, world)
        assert isinstance(self.runner.transform, Rescaler)
        self.observed = self.runner.transform = ObservedRescaler(self.runner.transform)
        self.every = every
        self.chosen = spread_out(list(self.engine.adapted), count)
        self.gradients: list[GradientRank] = []

    def take_step(
        self, step: int, micro_batches: MicroBatches
    ) -> tuple[dict[str, Any], list[float]]:
        batch = list(islice(micro_batches, self.options.train.gradient_accumulation_steps))
        if step % self.every == 0:
            self._measure(step, batch)
        return super().take_step(step, MicroBatches(iter(batch), self.world.device))

    def _measure(self, step: int, batch: Sequence[MicroBatch]) -> None:
        targets = self.feed.batches.target_tokens(step)

        def losses() -> Iterator[Tensor]:
            for micro_batch in batch:
                self.watchdog.at(f"the gradients of step {step + 1}")
                yield self.loss(self.model, micro_batch).loss / targets

        for name, gradient in weight_gradients(
            self.model,
            {name: self.engine.adapted[name] for name in self.chosen},
            losses,
            self.world,
            release=self.engine.release,
            budget=BUDGET,
        ):
            values = torch.linalg.svdvals(gradient.local.view(gradient.shape))
            largest = values[0].clamp_min(torch.finfo(values.dtype).tiny)
            self.gradients.append(
                GradientRank(
                    step,
                    name,
                    min(gradient.shape),
                    int((values > RELATIVE_THRESHOLD * largest).sum()),
                    float((values / largest).square().sum()),
                )
            )
        self.watchdog.pause()


def observe(options: Options, world: World, *, every: int, count: int) -> dict[str, Any]:
    """Train, and return what was observed, ready for JSON.

    Raises:
        UserError: as for ``ObservingTrainer``.
    """
    trainer = ObservingTrainer(options, world, every=every, count=count)
    trainer.run()
    return {
        "rank": options.method.rank,
        "batch": trainer.options.train.train_batch_size,
        "layers": len(trainer.engine.adapted),
        "gradients": [asdict(one) for one in trainer.gradients],
        "shares": [asdict(one) for one in trainer.observed.shares],
    }
