"""The step benchmark on a tiny model: it times both trainers in turn; a mistake is one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scalora_dist.data.collate import batch_of
from tests.support import launched
from tests.support.tiny_models import save_task
from tools.bench_step import labels_of

ROOT = Path(__file__).parents[2]

# PEFT can be imported here, unlike in a launched run of ours.
ENVIRONMENT = os.environ | launched.ENVIRONMENT | {"PYTHONPATH": str(ROOT)}

pytestmark = pytest.mark.heavy


def bench(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    save_task(folder)
    given = ["--model_name_or_path", folder, "--dataset", folder / "texts.jsonl", "--rank", "4"]
    given += ["--rounds", "2", "--max_length", "8", "--json", folder / "out.json", *words]
    return subprocess.run(
        [sys.executable, "-m", "tools.bench_step", *map(str, given)],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_every_step_is_timed_in_every_round(tmp_path: Path, stage: str) -> None:
    done = bench(tmp_path, "--ds_config", stage)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    for name in ("lora", "peft", "scalora", "rescale"):
        assert len(found[name]) == 2 and min(found[name]) > 0
    assert "from full logits" in done.stdout
    assert "at most 0.9 is wanted" in done.stdout and "at most 0.04 is wanted" in done.stdout
    ratios = [mine / theirs for mine, theirs in zip(found["lora"], found["peft"], strict=True)]
    assert found["LoRA / PEFT"] == ratios


def test_labels_are_those_of_the_examples() -> None:
    """Rows of different lengths, with and without targets inside."""
    rows = [([5, 6, 7, 8], [-100, 6, -100, 8]), ([3, 4], [-100, 4]), ([9, 2, 1], [-100, -100, 1])]
    labels = [row + [-100] * (4 - len(row)) for _, row in rows]
    ids = [row + [0] * (4 - len(row)) for row, _ in rows]
    batch = batch_of(torch.tensor(ids), torch.tensor(labels))
    assert labels_of(batch).tolist() == labels


def test_a_run_without_deepspeed_is_refused(tmp_path: Path) -> None:
    done = bench(tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: PEFT's step is DeepSpeed's")


def test_a_step_of_several_micro_batches_is_refused(tmp_path: Path) -> None:
    done = bench(tmp_path, "--ds_config", "zero2", "--gradient_accumulation_steps", "2")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--gradient_accumulation_steps")


def test_peft_s_model_gets_the_attention_that_was_asked_for(tmp_path: Path) -> None:
    done = bench(tmp_path, "--ds_config", "zero2", "--attn_implementation", "no_such_attention")
    assert done.returncode != 0 and "no_such_attention" in done.stderr
