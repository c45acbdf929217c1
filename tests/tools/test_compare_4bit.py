"""The comparison on 4-bit bases: its three ways on a tiny model, and what requantizing does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.layers.fourbit_linear import FourBit, FourBitLinear
from tests.support import runs, tiny_models

ROOT = Path(__file__).parents[2]
pytest.importorskip("bitsandbytes")
sys.path.insert(0, str(ROOT / "tools"))
import compare_4bit  # noqa: E402


def test_what_arrives_of_a_requantized_merge() -> None:
    """A change as large as the steps between 4-bit numbers arrives, a small one does not."""
    torch.manual_seed(0)
    layer = FourBitLinear.quantize(
        nn.Linear(128, 64, bias=False), FourBit("nf4", True, None, torch.uint8)
    )
    shard = FlatShard(torch.zeros(64 * 128), 0, (64, 128))
    shards = LayerShards("x", 0.5, shard, shard, shard, shard, shard, (), ())
    target = compare_4bit.Requantized({"x": layer})
    left, right = torch.randn(64, 3), torch.randn(128, 3)
    kept = {}
    for size in (1.0, 1e-5):
        before = layer.dense(layer.weight, torch.float32)
        target.add(shards, size * left, right)
        moved = layer.dense(layer.weight, torch.float32) - before
        change = size * left @ right.T
        kept[size] = target.kept[-1]
        share = float((moved * change).sum() / change.square().sum())
        assert kept[size] == pytest.approx(share, rel=1e-3, abs=1e-3)
        noise = float((moved - change).norm() / change.norm())
        assert target.noise[-1] == pytest.approx(noise, rel=1e-3)
    assert kept[1.0] == pytest.approx(1, abs=0.05)
    large, small = target.noise
    assert large < 0.2 and small > 1


@pytest.mark.heavy
def test_a_run_on_a_tiny_model(tmp_path: Path) -> None:
    task = tmp_path / "task"
    tiny_models.save_odd_model(task, "llama")
    tiny_models.save_texts(task, "abc ", longest=24, count=41)
    folder = tmp_path / "out"
    words = runs.words(
        {
            "model_name_or_path": task,
            "dataset": task / "texts.jsonl",
            "max_length": 24,
            "eval_size": 5,
            "rank": 4,
            "max_steps": 11,
            "per_device_train_batch_size": 4,
            "output_dir": folder,
            "seeds": 3,
        }
    )
    command = [sys.executable, "tools/compare_4bit.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == list(compare_4bit.WAYS)
    losses = [found["3"]["losses"] for found in results.values()]
    assert all(len(each) == 11 for each in losses)
    assert losses[0][0] == losses[1][0] == losses[2][0]  # nothing has been trained
    assert len({each[-1] for each in losses}) == 3
    requantized = results[compare_4bit.REQUANTIZED]["3"]
    assert requantized["kept"] < 0.5 and requantized["noise"] > 0.5
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [f"| {way}" for way in compare_4bit.WAYS]
    assert "<svg" in (folder / "curves.svg").read_text()
