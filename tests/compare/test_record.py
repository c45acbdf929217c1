"""runs.jsonl, and what a run's folder holds before and after."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from scalora_dist.compare import record
from scalora_dist.compare.record import Records
from scalora_dist.errors import UserError


def test_a_line_that_a_kill_left_incomplete_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"seed": 1}\n{"seed": 2}\n{"se')
    assert [line["seed"] for line in Records(path).lines] == [1, 2]
    with Records(path) as records:
        records.add({"seed": 3})
        with pytest.raises(UserError, match="another scalora compare"), Records(path):
            pass
    assert [json.loads(line)["seed"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_many_losses_become_means_of_their_steps() -> None:
    losses = np.random.default_rng(0).normal(3.0, 1.0, 2500)
    points = record.condense(losses.tolist())
    ends = [0, *record.point_steps(2500, len(points))]
    assert (len(points), ends[-1]) == (1000, 2500)
    means = [losses[a:b].mean() for a, b in pairwise(ends)]
    np.testing.assert_allclose(np.array(points, dtype=float), means, rtol=1e-4, atol=1e-4)
    assert record.condense([1.234567, None, math.inf]) == [1.2346, None, None]
    assert record.point_steps(3, 3) == [1, 2, 3]


def test_a_run_has_diverged_if_too_many_steps_in_a_row_were_skipped() -> None:
    good, bad = {"loss": 1.0}, {"loss": None, "skipped_step": True}
    assert record.gave_up([good, bad, bad], 2)
    assert not record.gave_up([bad, bad, good], 2)
    assert not record.gave_up([bad], 2)
    assert record.ends_finite([bad, good, {"eval_loss": 1.0}])
    assert not record.ends_finite([good, bad, {"eval_loss": 1.0}])
    assert not record.ends_finite([{"eval_loss": 1.0}, good, {"eval_loss": None}])


def test_a_run_goes_on_only_from_one_with_the_same_options(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / record.OUTPUT / "checkpoint-2"
    record.prepare(tmp_path / "run", {"max_steps": 4})
    checkpoint.mkdir(parents=True)
    record.prepare(tmp_path / "run", {"max_steps": 4})
    assert checkpoint.exists()
    record.prepare(tmp_path / "run", {"max_steps": 8})
    assert not checkpoint.exists()
