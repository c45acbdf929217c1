"""The command as a user types it, mistakes included."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support import launched, runs
from tests.support.forked import Forked
from tests.support.ranks import free_port

TASK = {"dataset": "reasoning_gym:chain_sum", "dataset_size": 32, "eval_size": 8, "max_steps": 2}


def launch(
    *words: str, engine: str, installed: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """As a user starts this engine, on CPU ranks.

    Args:
        words: the options of a run.
        engine: a key of LAUNCHERS.
        installed: a folder with the unpacked wheel, which then runs outside the clone.
    """
    launcher = launched.LAUNCHERS[engine]
    if engine != "local":
        launcher = [*launcher, "--master_port", str(free_port())]
    start, cwd, path = ["launch/train.py"], runs.REPOSITORY, launched.QUICK_START
    if installed:
        start = ["--module" if engine == "zero3" else "-m", "scalora_dist", "train"]
        cwd, path = installed.parent, f"{installed}:{launched.WITHOUT_PEFT}"
    return subprocess.run(
        [*launcher, *start, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | launched.ENVIRONMENT | {"PYTHONPATH": path},
    )


def options(model: str, folder: Path, engine: str, **others: Any) -> dict[str, Any]:
    given = {"model_name_or_path": model, "output_dir": folder, **TASK}
    return given | runs.engine_options(engine, folder.parent) | others


@pytest.mark.floors
@pytest.mark.parametrize("engine", ["zero3", pytest.param("fsdp", marks=pytest.mark.heavy)])
def test_an_installed_wheel_trains_and_shows_one_table(
    tiny_model: str, tmp_path: Path, engine: str, unpacked_wheel: Path
) -> None:
    """Started as a module, outside the clone, with a recipe and a config that are named."""
    named = {"ds_config": "zero3"} if engine == "zero3" else {"fsdp": True}
    given = {"model_name_or_path": tiny_model, "output_dir": tmp_path / "run", "config": "demo"}
    short = {"dataset_size": 32, "eval_size": 8, "max_steps": 2, "scaling_rule": "nnls"}
    words = runs.words(given | named | short)
    done = launch(*words, engine=engine, installed=unpacked_wheel)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out exact match") == 1
    assert done.stderr.count("14 layers adapted") == 1
    rules = json.loads((tmp_path / "run" / "summary.json").read_text())["layers_by_rule"]
    assert sum(rules.values()) == 28
    assert rules["scalar"] == 0


def test_a_mistake_is_one_sentence_and_status_2(tiny_model: str, tmp_path: Path) -> None:
    folder, broken = tmp_path / "run", tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    done = launch(*runs.words(options(tiny_model, folder, "local", dataset=broken)), engine="local")
    assert done.returncode == 2
    check_one_sentence(done.stderr, "line 2", folder)
    assert "Traceback" not in done.stdout


@pytest.mark.heavy
def test_two_ranks_tell_a_mistake_once(tiny_model: str, tmp_path: Path) -> None:
    """One that is found when the model is loaded. Launchers pass on the first failure."""
    folder = tmp_path / "run"
    case = options(tiny_model, folder, "zero3", target_modules="q_proj w_proj")
    with Forked(2, case, tmp_path / "log") as run:
        assert run.wait()[0] == 2, run.text()
    check_one_sentence(run.text(), "w_proj", folder)


def check_one_sentence(text: str, says: str, folder: Path) -> None:
    sentences = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(sentences) == 1
    assert says in sentences[0]
    assert "Traceback" not in text
    assert not folder.exists()


def test_nothing_is_overwritten_unasked(tiny_model: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    kept = folder / "metrics.jsonl"
    kept.write_text("mine")
    with Forked(2, options(tiny_model, folder, "zero3"), tmp_path / "log") as run:
        assert run.wait()[0] == 2, run.text()  # launchers pass on the first failure
    assert "--overwrite_output_dir" in run.text()
    assert kept.read_text() == "mine"
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
