"""The start of LoRA-SB's core for each ``--sb_eta``, on real ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import tiny_models, tiny_runs
from tests.support.workers import first_step as work

RATE, WARM_UP = 3e-3, 0.02


@pytest.mark.parametrize(("size", "engine"), [(1, "local"), (2, "zero3")])
@pytest.mark.parametrize("length", [{"num_train_epochs": 2.5}, {"max_steps": 7}])
def test_the_two_etas_of_lora_sb(
    ranks: Any, tmp_path: Path, size: int, engine: str, length: dict[str, float]
) -> None:
    """U and V are the same; R is larger by the steps of 3 examples that the warm-up would have."""
    task = tiny_models.save_task(tmp_path)
    options = {"method": "lora-sb", "learning_rate": RATE, "warmup_ratio": WARM_UP, **length}
    options |= {"lora_alpha": None, "per_device_train_batch_size": 6, "start_samples": 6}
    starts = {}
    for eta in ("paper", "code"):
        case = tiny_runs.options(task, tmp_path / eta, engine, sb_eta=eta, **options)
        (starts[eta], examples), *_ = ranks(size).run(work.start, case)
    seen = examples * length.get("num_train_epochs", 0) or 7 * tiny_runs.TASK["train_batch_size"]
    ratio = 1 / (WARM_UP * math.ceil(seen / 3))
    for layer, paper in starts["paper"].items():
        code = starts["code"][layer]
        assert np.array_equal(paper["U"], code["U"]) and np.array_equal(paper["V"], code["V"])
        np.testing.assert_allclose(code["R"], ratio * paper["R"], rtol=1e-6, atol=0)
        # Σ_r of a matrix of signs, times η. Its energy is at most that of all m·n signs.
        singular = np.diag(paper["R"]).astype(float) / RATE
        assert (singular > 0).all() and (np.diff(singular) <= 0).all()
        assert np.array_equal(paper["R"], np.diag(np.diag(paper["R"])))
        assert (singular**2).sum() <= len(paper["U"]) * len(paper["V"]) * (1 + 1e-6)
