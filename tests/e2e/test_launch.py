"""The command as a user types it, mistakes included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import runs

TASK = {"dataset": "reasoning_gym:chain_sum", "dataset_size": 32, "eval_size": 8, "max_steps": 2}


def launch(*words: str, ranks: int) -> subprocess.CompletedProcess[str]:
    """DeepSpeed's launcher, on the ranks' CPUs; for one rank, Python."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks)]
    return subprocess.run(
        [*launcher, "launch/train.py", *words],
        cwd=runs.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
    )


def options(model: str, folder: Path, **others: Any) -> list[str]:
    given = {
        "model_name_or_path": model,
        "output_dir": folder,
        "ds_config": runs.ds_config("zero3"),
        **TASK,
        **others,
    }
    return runs.words(given)


@pytest.mark.floors
def test_the_launcher_trains_and_shows_one_table(tiny_model: str, tmp_path: Path) -> None:
    done = launch(*options(tiny_model, tmp_path / "run", scaling_rule="nnls"), ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out exact match") == 1
    assert done.stderr.count("14 layers adapted") == 1
    rules = json.loads((tmp_path / "run" / "summary.json").read_text())["layers_by_rule"]
    assert sum(rules.values()) == 28
    assert rules["scalar"] == 0


def mistakes(tmp_path: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """{mistake: (options, what the sentence must say)}"""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    return {
        "target": ({"target_modules": "q_proj w_proj"}, "w_proj"),
        "data": ({"dataset": broken}, "line 2"),
        "rank": ({"rank": 29}, "between 1 and 14"),
    }


@pytest.mark.parametrize(
    ("ranks", "mistake"),
    [
        (1, "data"),
        *(pytest.param(2, name, marks=pytest.mark.heavy) for name in ("data", "target", "rank")),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(
    tiny_model: str, tmp_path: Path, ranks: int, mistake: str
) -> None:
    others, says = mistakes(tmp_path)[mistake]
    folder = tmp_path / "run"
    done = launch(*options(tiny_model, folder, **others), ranks=ranks)
    assert done.returncode == 2
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(sentences) == 1
    assert says in sentences[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert not folder.exists()


@pytest.mark.heavy
def test_nothing_is_overwritten_unasked(tiny_model: str, tmp_path: Path) -> None:
    kept = tmp_path / "metrics.jsonl"
    kept.write_text("mine")
    done = launch(*options(tiny_model, tmp_path), ranks=2)
    assert done.returncode == 2
    assert "--overwrite_output_dir" in done.stderr
    assert kept.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
