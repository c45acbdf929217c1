"""Whole runs: the same losses however they are sharded, and what a run leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import runs
from ranks import Ranks

GetRanks = Callable[[int], Ranks]

TASK = {
    "dataset": "reasoning_gym:chain_sum",
    "dataset_size": 64,
    "eval_size": 9,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 2,
}


def options(model: str, folder: Path, stage: str, **others: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": model,
        "output_dir": folder,
        "ds_config": runs.ds_config(stage),
        **TASK,
        **others,
    }


def test_losses_do_not_depend_on_the_sharding(
    ranks: GetRanks, demo_model: str, tmp_path: Path
) -> None:
    """10 fp32 steps of the demo model, a rescale each, at every stage; accumulation for ranks."""
    others = {"max_steps": 10, "eval_size": 0, "save_model": False, "update_rank_layers": 0}
    losses = {}
    for stage in ("zero0", "zero1", "zero2", "zero3"):
        folder = tmp_path / stage
        ranks(2).run(runs.run, options(demo_model, folder, stage, **others), timeout=500)
        losses[stage] = torch.tensor(runs.losses(folder), dtype=torch.float64)
    alone = options(demo_model, tmp_path / "1", "zero3", gradient_accumulation_steps=2, **others)
    ranks(1).run(runs.run, alone, timeout=500)
    losses["1 rank"] = torch.tensor(runs.losses(tmp_path / "1"), dtype=torch.float64)
    largest = {
        k: float(((v - losses["zero3"]) / losses["zero3"]).abs().max()) for k, v in losses.items()
    }
    print("largest relative difference from ZeRO-3 on 2 ranks:", largest)
    assert len(losses["zero3"]) == 10
    assert max(largest.values()) < 1e-4


@pytest.mark.parametrize(
    ("world", "stage", "others"),
    [
        (2, "zero3", {}),
        (3, "zero2", {"gradient_checkpointing": True}),
        (2, "zero3_offload", {"gradient_checkpointing": True}),
        (2, "zero3", {"bf16": True, "gradient_accumulation_steps": 2}),
        (1, "zero1", {"method": "lora", "bf16": True}),
        (4, "zero3", {"scaling_interval": 2, "scaling_rule": "nnls"}),
    ],
)
def test_what_a_run_leaves(
    ranks: GetRanks, tiny_model: str, tmp_path: Path, world: int, stage: str, others: dict
) -> None:
    case = options(tiny_model, tmp_path, stage, max_steps=4, eval_steps=3, **others)
    ranks(world).run(runs.run, case)
    lines = runs.metrics(tmp_path)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert {"loss", "learning_rate", "grad_norm", "tokens", "seconds"} <= line.keys()
        interval = others.get("scaling_interval", 1)
        due = others.get("method") != "lora" and (line["step"] - 1) % interval == 0
        assert ("rescale" in line) == due == ("grad_norm_before" in line)
        if due:
            rules = {k: v for k, v in line["rescale"].items() if k != "seconds"}
            assert rules.keys() == {"column", "scalar", "nnls", "skipped"}
            assert sum(rules.values()) == 14
    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(evaluations) == [0, 3, 4]
    assert evaluations[4] < evaluations[0]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["eval_loss"] == [evaluations[0], evaluations[4]]
    assert list((tmp_path / "tensorboard").glob("events*"))
    tolerance = 2e-3 if others.get("bf16") else 1e-5
    assert merged_loss(tmp_path / "model", case) == pytest.approx(evaluations[4], rel=tolerance)


def merged_loss(folder: Path, case: dict[str, Any]) -> float:
    """The held-out loss of the model that a run wrote, by plain transformers."""
    from scalora_dist.config import parse_options
    from scalora_dist.data import prepare_data

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not any(name.endswith((".A", ".B")) for name in model.state_dict())
    data = prepare_data(parse_options(runs.words(case)).data, tokenizer, 42).evaluation
    assert data is not None
    total, targets = 0.0, 0
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            mean = model(input_ids=ids, labels=labels).loss
        total += float(mean) * row["target_tokens"]
        targets += row["target_tokens"]
    return total / targets


def test_without_held_out_data_the_model_is_in_training_mode(
    ranks: GetRanks, tiny_model: str, tmp_path: Path
) -> None:
    """Dropout and gradient checkpointing are off in evaluation mode."""
    case = options(tiny_model, tmp_path, "zero3", max_steps=2, save_model=False)
    modes = ranks(1).run(runs.training_modes, {**case, "eval_size": 0, "lora_dropout": 0.5})[0]
    assert modes == [True, True]


def test_persistent_buffers_are_part_of_the_model(
    ranks: GetRanks, demo_model: str, tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    expected = runs.save_tiny_deepseek(model, AutoTokenizer.from_pretrained(demo_model))
    case = options(str(model), out, "zero3", max_steps=1, target_modules="o_proj")
    ranks(2).run(runs.run, {**case, "eval_size": 0})
    state = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    assert expected
    for name, buffer in expected.items():
        assert torch.equal(state[name], buffer)
