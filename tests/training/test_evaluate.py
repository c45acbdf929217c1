"""What an evaluation that is cut short leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scalora_dist.distributed.world import World
from scalora_dist.training.evaluate import evaluate
from tests.support import runs, tiny_models, tiny_runs


def cut_short(world: World, case: dict[str, Any]) -> tuple[int, bool]:
    """The number of batches before the exception, and whether the module is in training mode."""
    trainer = runs.make(world, case)
    module, feed, batches = trainer.engine.module, trainer.feed, []

    def third() -> None:
        batches.append(module.training)
        if len(batches) == 3:
            raise ArithmeticError("on purpose")

    assert feed.data.evaluation is not None
    with pytest.raises(ArithmeticError):
        evaluate(module, trainer.loss, feed.data.evaluation, feed.collate, world, 1, third)
    trainer.close()
    assert not any(batches)
    return len(batches), module.training


def test_an_exception_leaves_the_training_mode(ranks: Any, tmp_path: Path) -> None:
    task = tiny_models.save_task(tmp_path / "task")
    case = tiny_runs.options(task, tmp_path / "run", "local", eval_size=5)
    assert ranks(1).run(cut_short, case) == [(3, True)]
