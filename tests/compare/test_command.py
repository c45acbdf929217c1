"""A whole study of a tiny model: stopped half-way, resumed, and its report computed again.

One of its three rates diverges.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from scalora_dist.compare.command import compare_command
from scalora_dist.distributed.stop_signals import StopSignals
from scalora_dist.errors import Preempted, UserError
from tests.support.ranks import forkserver
from tests.support.refusals import one_sentence
from tests.support.tiny_models import save_task

# With the lowest nothing changes, with the highest the loss is not finite: no grid is widened.
RATES = [1e-30, 1.0, 1e30]
SEEDS = 2


def save_study(folder: Path, task: Path, model: Path) -> Path:
    study = {
        "common": {
            "model_name_or_path": str(model),
            "max_steps": 6,
            "train_batch_size": 8,
            "per_device_train_batch_size": 8,
            "max_length": 24,
            "update_rank_layers": 2,
            "max_skipped_steps": 3,
        },
        "setups": {"texts": {"dataset": str(task / "texts.jsonl")}},
        "validation_size": 6,
        "test_size": 6,
        "ranks": [2],
        "methods": {"LoRA": {"method": "lora"}, "ScaLoRA": {"method": "scalora"}},
        "baseline": "LoRA",
        "learning_rates": RATES,
        "tuning_seeds": 1,
        "final_seeds": SEEDS,
        "smoke": True,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "runs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def stop_after(folder: Path, count: int) -> threading.Thread:
    """Sends SIGTERM to this process when ``count`` runs are recorded."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while len(lines(folder)) < count and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_task(tmp_path_factory.mktemp("task"))


def test_a_study_is_stopped_resumed_and_reported(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    study = save_study(tmp_path, task, model=task)
    words = [str(study), "--output_dir", str(folder), "--workers", "2"]
    with StopSignals() as signals:
        thread = stop_after(folder, 3)
        with pytest.raises(Preempted, match="stopped by SIGTERM"):
            compare_command(words, signals, forkserver())
        thread.join()
    before = lines(folder)
    assert 3 <= len(before) < 10
    with StopSignals() as signals:
        compare_command(words, signals, forkserver())
    after = lines(folder)
    assert after[: len(before)] == before
    assert len(after) == 2 * (len(RATES) + SEEDS)
    lost = [record for record in after if record["diverged"]]
    assert [record["learning_rate"] for record in lost] == [RATES[2]] * 2
    check_results(folder, after)
    check_what_is_left(folder)
    check_other_defaults_are_refused(folder, words)


def check_other_defaults_are_refused(folder: Path, words: list[str]) -> None:
    """Runs of a version whose default of an option was another are not mixed with today's."""
    text = (folder / "runs.jsonl").read_text()
    (folder / "runs.jsonl").write_text(
        text.replace('"scaling_rule": "adamw"', '"scaling_rule": "x"')
    )
    with StopSignals() as signals, pytest.raises(UserError) as error:
        compare_command([*words, "--report_only"], signals)
    assert "ScaLoRA" in one_sentence(error) and "scaling_rule" in one_sentence(error)


def check_results(folder: Path, records: list[dict[str, Any]]) -> None:
    """The report has the numbers that follow from runs.jsonl."""
    results = json.loads((folder / "results.json").read_text())
    (setup,) = results["setups"].values()
    (table,) = setup["tables"]
    losses = {}
    for row in table["rows"]:
        label = row["cell"]["label"]
        own = [record for record in records if record["label"] == label]
        tuned = [record for record in own if record["part"] == "tune"]
        sound = [record for record in tuned if not record["diverged"]]
        best = min(sound, key=lambda record: record["eval_loss"])["learning_rate"]
        assert row["best_rate"] == best == RATES[1]
        final = sorted(
            (record for record in own if record["part"] == "final"), key=lambda x: x["seed"]
        )
        assert {record["learning_rate"] for record in final} == {best}
        losses[label] = np.array([record["eval_loss"] for record in final])
        assert row["loss"]["mean"] == pytest.approx(losses[label].mean())
        assert row["loss"]["sd"] == pytest.approx(losses[label].std(ddof=1))
    (comparison,) = setup["comparisons"]
    difference = losses["ScaLoRA"] - losses["LoRA"]
    half = 12.7062 * difference.std(ddof=1) / 2**0.5  # t(1) at 0.975
    assert comparison["loss"]["low"] == pytest.approx(difference.mean() - half, rel=1e-4)
    assert comparison["loss"]["high"] == pytest.approx(difference.mean() + half, rel=1e-4)
    text = (folder / "report.md").read_text()
    assert text.startswith("**A smoke run is no study")
    assert f"{losses['ScaLoRA'].mean():.4f} ± {losses['ScaLoRA'].std(ddof=1):.4f}" in text
    assert f"{difference.mean():+.4f} [{difference.mean() - half:+.4f}, " in text


def check_what_is_left(folder: Path) -> None:
    """A log, metrics and a summary of each run, and the pictures."""
    left = {path.name for path in (folder / "runs").rglob("*") if path.is_file()}
    assert left == {"log", "metrics.jsonl", "summary.json"}  # no summary of those that diverged
    assert len(list((folder / "runs").rglob("log"))) == 2 * (len(RATES) + SEEDS)
    assert {path.name for path in folder.glob("*.png")} == {
        "loss_by_rate-texts-r2.png",
        "loss_by_step-texts-r2.png",
    }


def test_a_run_that_fails_stops_the_study_and_its_log_is_named(task: Path, tmp_path: Path) -> None:
    study = save_study(tmp_path, task, model=tmp_path / "nowhere")
    words = [str(study), "--output_dir", str(tmp_path / "out"), "--workers", "1"]
    with StopSignals() as signals, pytest.raises(UserError) as error:
        compare_command(words, signals, forkserver())
    log = Path(one_sentence(error).rpartition("see ")[2])
    assert "nowhere" in log.read_text()
    assert not lines(tmp_path / "out")
