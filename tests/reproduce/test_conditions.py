"""What a watched run finds, against dense float64 formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scalora_dist.config.parser import parse_options
from scalora_dist.data.micro_batch import MicroBatch
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.errors import UserError
from scalora_dist.layers.adapted_linear import LowRankLinear
from scalora_dist.reproduce import plots
from scalora_dist.reproduce.command import reproduce_command
from scalora_dist.reproduce.conditions import ObservingTrainer
from scalora_dist.reproduce.figure2 import options_of, table
from tests.support import runs, tiny_models, tiny_runs
from tests.support.ranks import Ranks
from tests.support.reference import Array


def is_positive(A: Array, B: Array, grad_A: Array, grad_B: Array) -> bool:
    """Whether z = H⁺λ is positive (Theorem 5); unknowns without any effect do not count."""
    S_A, S_B = np.hstack([A, grad_A]), np.hstack([grad_B, B])
    H = (S_A.T @ S_A) * (S_B.T @ S_B)
    lam = np.concatenate([np.diag(grad_B.T @ grad_B), np.diag(grad_A.T @ grad_A)])
    used = np.diag(H) > 0
    unit = np.sqrt(np.diag(H)[used])
    z = np.linalg.pinv(H[np.ix_(used, used)] / np.outer(unit, unit)) @ (lam[used] / unit)
    return bool((z > 0).all())


class Checked(ObservingTrainer):
    """Also computes gradients of whole weights by autograd alone, and shares by dense formulas."""

    def watch(self) -> None:
        self.dense: list[tuple[int, str, Tensor]] = []
        self.positive: list[float] = []
        rescaler = self.observed.rescaler
        grams = rescaler.grams

        def note(layers: Sequence[LayerShards]) -> Any:
            if len(self.positive) == len(self.observed.shares):
                factors = [(x.A, x.B, x.grad_A, x.grad_B) for x in layers]
                found = [
                    is_positive(*(f.local.view(f.shape).double().numpy() for f in four))
                    for four in factors
                ]
                self.positive.append(float(np.mean(found)))
            return grams(layers)

        rescaler.grams = note  # type: ignore[method-assign]

    def _measure(self, step: int, batch: Sequence[MicroBatch]) -> None:
        super()._measure(step, batch)
        targets = self.feed.batches.target_tokens(step)
        for name in self.chosen:
            weight = self.model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.requires_grad_(True)
            with patch.object(LowRankLinear, "forward", by_autograd):
                losses = torch.stack([self.loss(self.model, part).loss for part in batch])
            (gradient,) = torch.autograd.grad(losses.sum() / targets, weight)
            self.dense.append((step, name, gradient))
            weight.requires_grad_(False)


def by_autograd(layer: LowRankLinear, x: Tensor) -> Tensor:
    """The forward of a layer, in operations that also give the gradient of W."""
    y = F.linear(x, layer.weight, layer.bias)
    return y + layer.scaling * F.linear(x @ layer.B, layer.A)


def watched(world: World, case: dict[str, Any]) -> tuple[Any, ...]:
    trainer = Checked(parse_options(runs.words(case)), world, every=3, count=3)
    trainer.watch()
    trainer.run()
    return trainer.observed.shares, trainer.positive, trainer.gradients, trainer.dense


@pytest.mark.parametrize("rule", ["paper", "adamw"])
def test_ranks_and_shares_are_those_of_dense_formulas(
    ranks: Callable[[int], Ranks], tmp_path: Path, rule: str
) -> None:
    """Theorem 5's condition, whatever the run's own rule solves."""
    task = tiny_models.save_task(tmp_path / "task")
    options = {"max_steps": 4, "lora_dropout": 0.0, "learning_rate": 1e-2, "scaling_rule": rule}
    case = tiny_runs.options(task, tmp_path / "out", "local", **options)
    ((shares, positive, gradients, dense),) = ranks(1).run(watched, case)
    assert [share.positive for share in shares] == positive
    assert [share.step for share in shares] == [0, 1, 2, 3]
    assert len(positive) == 4 and 0 < positive[1] < 1  # some layers are positive, some not
    assert all(share.bounded <= share.positive for share in shares)
    assert [(one.step, one.layer) for one in gradients] == [(step, name) for step, name, _ in dense]
    assert {one.step for one in gradients} == {0, 3} and len(gradients) == 6
    for one, (_, _, gradient) in zip(gradients, dense, strict=True):
        assert one.rank == int(torch.linalg.matrix_rank(gradient, rtol=1e-3))
        stable = float((gradient.norm() / torch.linalg.matrix_norm(gradient, 2)) ** 2)
        assert one.stable_rank == pytest.approx(stable, rel=1e-3)


def observed(rank: int, steps: Sequence[int]) -> dict[str, Any]:
    """As `observe` returns: the share of step t is t %."""
    gradient = {"step": 0, "layer": "q", "size": 8, "rank": 5, "stable_rank": 1.5}
    shares = [{"step": t, "positive": t / 100, "bounded": t / 200} for t in steps]
    return {"rank": rank, "batch": 4, "layers": 1, "gradients": [gradient], "shares": shares}


@pytest.mark.heavy
def test_the_figure_and_its_table(tmp_path: Path) -> None:
    """A run with a rescale at each fifth step, and a run of one step."""
    data = {"model": "small", "runs": [observed(2, [0, 5, 10, 15, 20]), observed(4, [0])]}
    plots.draw_figure2(data, tmp_path / "figure2.png")
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")
    text = table(data)
    assert "| 2 | 4 | 100.0% | 5 | 5 | 1.5 | 8 |" in text
    assert "| 4 | 4 | 0.0% | 5 | 5 | 1.5 | 8 |" in text
    assert "| 2 | 4 | 0% | 5% | 15% | 8% |" in text
    assert "| 4 | 4 | 0% | — | — | — |" in text


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="say figure1 or figure2 first"):
        reproduce_command(["figure3"])
    with pytest.raises(UserError, match="--rank=4: scalora reproduce sets --rank"):
        options_of(["--dataset", "x.jsonl", "--rank=4"], Path(), rank=2, batch=8)
