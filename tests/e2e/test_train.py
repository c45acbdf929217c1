"""Whole runs: the same losses however they are sharded, and what a run leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import runs, tiny_models
from tests.support.ranks import Ranks

GetRanks = Callable[[int], Ranks]

TASK = {
    "dataset": "reasoning_gym:chain_sum",
    "dataset_size": 64,
    "eval_size": 9,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 2,
}


def options(model: str, folder: Path, engine: str, **others: Any) -> dict[str, Any]:
    """``folder`` is the output; its parent is there already."""
    return {
        "model_name_or_path": model,
        "output_dir": folder,
        **runs.engine_options(engine, folder.parent),
        **TASK,
        **others,
    }


@pytest.mark.heavy
def test_losses_of_the_demo_model_do_not_depend_on_the_sharding(
    ranks: GetRanks, demo_model: str, tmp_path: Path
) -> None:
    """3 fp32 steps, a rescale each, against one process; test_engines_agree.py has every case."""
    others = {"max_steps": 3, "eval_size": 0, "save_model": False, "update_rank_layers": 0}
    others |= {"train_batch_size": 4}
    losses = {}
    for size, engine in ((1, "local"), (2, "zero3"), (2, "fsdp")):
        case = options(demo_model, tmp_path / engine, engine, **others)
        ranks(size).run(runs.run, case, timeout=500)
        losses[engine] = torch.tensor(runs.losses(tmp_path / engine), dtype=torch.float64)
    alone = losses.pop("local")
    largest = {k: float(((v - alone) / alone).abs().max()) for k, v in losses.items()}
    print("largest relative difference from one process:", largest)
    assert len(alone) == 3
    assert max(largest.values()) < 1e-4


@pytest.mark.floors
@pytest.mark.parametrize(
    ("world", "engine", "others"),
    [
        (2, "zero3", {}),
        (2, "zero3_offload", {"gradient_checkpointing": True}),
        (2, "zero3", {"bf16": True, "gradient_accumulation_steps": 2}),
        (4, "zero3", {"scaling_interval": 2, "scaling_rule": "nnls"}),
        (1, "local", {"bf16": True, "gradient_checkpointing": True}),
        (2, "fsdp_offload", {"bf16": True}),
        (4, "hybrid", {"bf16": True, "gradient_checkpointing": True}),
        *(
            pytest.param(*case, marks=pytest.mark.heavy)
            for case in (
                (1, "zero1", {"method": "lora", "bf16": True}),
                (3, "zero2", {"gradient_checkpointing": True}),
                (2, "fsdp", {"gradient_checkpointing": True}),
                (1, "local", {"gradient_accumulation_steps": 2}),
                (2, "fsdp", {"bf16": True, "gradient_accumulation_steps": 2}),
                (3, "fsdp_offload", {"method": "lora"}),
                (4, "hybrid", {}),
            )
        ),
    ],
)
def test_what_a_run_leaves(
    ranks: GetRanks,
    tiny_model: str,
    tmp_path: Path,
    world: int,
    engine: str,
    others: dict[str, Any],
) -> None:
    folder = tmp_path / "run"
    case = options(tiny_model, folder, engine, max_steps=4, eval_steps=3, **others)
    ranks(world).run(runs.run, case)
    lines = runs.metrics(folder)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert {"loss", "learning_rate", "grad_norm", "tokens", "seconds"} <= line.keys()
        interval = others.get("scaling_interval", 1)
        due = others.get("method") != "lora" and (line["step"] - 1) % interval == 0
        assert ("rescale" in line) == due == ("grad_norm_before" in line)
        if due:
            rules = {k: v for k, v in line["rescale"].items() if k != "seconds"}
            assert rules.keys() == {"column", "scalar", "nnls", "skipped", "kept"}
            assert sum(rules.values()) == 14
    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(evaluations) == [0, 3, 4]
    assert evaluations[4] < evaluations[0]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["eval_loss"] == [evaluations[0], evaluations[4]]
    assert list((folder / "tensorboard").glob("events*"))
    tolerance = 2e-3 if others.get("bf16") else 1e-5
    assert merged_loss(folder / "model", case) == pytest.approx(evaluations[4], rel=tolerance)


def merged_loss(folder: Path, case: dict[str, Any]) -> float:
    """The held-out loss of the model that a run wrote, by plain transformers."""
    from scalora_dist.config.parser import parse_options
    from scalora_dist.data.prepare import prepare_data

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
    case = options(tiny_model, tmp_path / "run", "zero3", max_steps=2, save_model=False)
    modes = ranks(1).run(runs.training_modes, {**case, "eval_size": 0, "lora_dropout": 0.5})[0]
    assert modes == [True, True]


@pytest.mark.floors
@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_persistent_buffers_are_part_of_the_model(
    ranks: GetRanks, demo_model: str, tmp_path: Path, engine: str
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    expected = tiny_models.save_tiny_deepseek(model, AutoTokenizer.from_pretrained(demo_model))
    case = options(str(model), out, engine, max_steps=1, target_modules="o_proj")
    ranks(2).run(runs.run, {**case, "eval_size": 0})
    state = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    assert expected
    for name, buffer in expected.items():
        assert torch.equal(state[name], buffer)
