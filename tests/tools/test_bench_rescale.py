"""The benchmark on a tiny model and two real ranks: what does not depend on the machine's mood."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import launched
from tests.support.ranks import free_port
from tests.support.tiny_models import save_task

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "bench_rescale.py"
ENV = os.environ | launched.ENVIRONMENT
RANK, HIDDEN, INTERMEDIATE, KEYS, LAYERS = 4, 64, 96, 32, 2
# (m, n) of the adapted layers of one block: q, o, k, v, gate, up, down.
SHAPES = 2 * [(HIDDEN, HIDDEN)] + 2 * [(KEYS, HIDDEN)] + 3 * [(INTERMEDIATE, HIDDEN)]

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and texts."""
    return save_task(
        tmp_path_factory.mktemp("bench"),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )


@pytest.fixture(scope="module")
def found(model: Path) -> dict[str, Any]:
    """The JSON of one run on two ranks under ZeRO-3."""
    port = str(free_port())
    result = model / "out.json"
    launch = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2", "--master_port"]
    options = ["--ds_config", "zero3", "--model_name_or_path", str(model), "--json", str(result)]
    options += ["--dataset", str(model / "texts.jsonl"), "--per_device_train_batch_size", "2"]
    options += ["--rank", str(RANK), "--rounds", "2", "--max_length", "8"]
    done = subprocess.run(
        [*launch, port, TOOL, *options], env=ENV, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rescale / step" in done.stdout
    return json.loads(result.read_text())


def test_every_duration_is_there(found: dict[str, Any]) -> None:
    steps = {"lora_step", "scalora_step", "scalora_step_interval_10"}
    assert found["variants"].keys() == steps | {"rescale", "local_merge", "naive_merge"}
    assert list(found["parts"]) == ["grams", "solve", "gather", "merge", "scale"]
    for spread in (found["variants"] | found["parts"]).values():
        assert 0 < spread["min_s"] <= spread["median_s"] <= spread["max_s"]
    assert found["naive_over_local"] > 0
    assert found["adapted_layers"] == LAYERS * len(SHAPES)
    assert found["options"]["method"]["rank"] == RANK
    assert {"device", "versions"} <= found.keys()


def test_shares_are_shares(found: dict[str, Any]) -> None:
    assert 0 < found["shares"]["interval_10"] < found["shares"]["interval_1"] < 1


def test_a_rescale_is_four_collectives_of_known_size(found: dict[str, Any]) -> None:
    """The gradients' norm and the grams: all-reduces; α, β and the rules: one all-gather; A and B:
    one (a single bucket)."""
    assert found["collectives"]["rescale"] == {"allreduce": 2, "allgather_base": 2}
    layers = LAYERS * len(SHAPES)
    # Of each factor its gram with N, and the squares of its gradient's columns. No row is split.
    grams = 8 + layers * 2 * ((2 * RANK) ** 2 + RANK) * 8
    solved = layers * (2 * RANK + 1) * 8
    factors = LAYERS * sum(m + n for m, n in SHAPES) * RANK * 4
    sent = grams + solved // 2 + factors // 2
    assert found["bytes"]["rescale"] == {"sent": sent, "received": grams + solved + factors}
    assert found["bytes"]["local_merge"] == {"sent": factors // 2, "received": factors}


def test_the_naive_merge_moves_every_weight_twice(found: dict[str, Any]) -> None:
    weights = LAYERS * sum(m * n for m, n in SHAPES) * 4
    naive, ours = found["bytes"]["naive_merge"], found["bytes"]["rescale"]
    assert naive["received"] >= 2 * weights
    assert naive["sent"] > ours["sent"] and naive["received"] > ours["received"]
    assert sum(found["collectives"]["naive_merge"].values()) >= 2 * LAYERS * len(SHAPES)


def test_a_rescale_is_all_that_scalora_sends_more(found: dict[str, Any]) -> None:
    """But for the norm, one float64, which a LoRA step reduces and a rescale has in its grams."""
    lora, scalora = found["bytes"]["lora_step"], found["bytes"]["scalora_step"]
    for way, size in found["bytes"]["rescale"].items():
        assert scalora[way] == lora[way] - 8 + size


def test_both_merges_give_the_same_weights(found: dict[str, Any]) -> None:
    assert found["merges"]["increment"] > 1e-3
    assert found["merges"]["difference"] <= 1e-5 * found["merges"]["increment"]


def test_mistakes_are_one_sentence(model: Path, tmp_path: Path) -> None:
    options = ["--ds_config", str(tmp_path / "none.json"), "--model_name_or_path", str(model)]
    options += ["--dataset", str(model / "texts.jsonl")]
    done = subprocess.run(
        [sys.executable, TOOL, *options],
        env=ENV | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --ds_config ")
    assert "Traceback" not in done.stderr
