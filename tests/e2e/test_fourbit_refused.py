"""What cannot be trained on 4 bits: one sentence, status 2, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from tests.support import tiny_models, tiny_runs
from tests.support.ranks import Ranks
from tests.support.workers.fourbit import options, save_even_model

pytest.importorskip("bitsandbytes")
GetRanks = Callable[[int], Ranks]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


def refused(ranks: GetRanks, case: dict[str, Any]) -> str:
    ((sentence, status, _),) = ranks(1).run(tiny_runs.refusal, case)
    assert status == 2 and sentence and "\n" not in sentence
    assert not Path(case["output_dir"]).exists()
    return sentence


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "full"}, ["--method full", "lora-xs"]),
        ({"method": "dora"}, ["--method dora", "scalora"]),
        ({"merge_target": "weight", "carry_rank": None}, ["--merge_target weight", "4 bits"]),
        ({"carry_rank": 3}, ["--carry_rank 3", "--rank 4"]),
        ({"carry_room": 2}, ["--carry_room 2", "--rank 4"]),
        ({"carry_rank": 0}, ["--carry_rank 0"]),
        ({"merge_rounding": "nearest"}, ["--merge_rounding"]),
        ({"load_in_4bit": False, "carry_rank": 8}, ["--carry_rank", "--merge_target carry"]),
        (
            {"load_in_4bit": False, "carry_rank": None, "carry_room": None, "carry_limit": 2},
            ["--carry_l"],
        ),
        (
            {"load_in_4bit": False, "bnb_4bit_quant_type": "fp4"},
            ["--bnb_4bit_quant_type", "is not"],
        ),
        ({"bf16": True, "bnb_4bit_quant_storage": "float32"}, ["float32", "bfloat16", "uint8"]),
        ({"bnb_4bit_quant_storage": "bfloat16"}, ["bfloat16", "float32", "uint8"]),
    ],
)
def test_options_that_cannot_be(
    ranks: GetRanks, task: Path, tmp_path: Path, given: dict[str, Any], words: list[str]
) -> None:
    case = options(task, tmp_path / "run", "local", **({"method": "scalora"} | given))
    sentence = refused(ranks, case)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, ["gptq"]),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, ["bitsandbytes in 8 bits"]),
    ],
)
def test_a_base_that_is_quantized_otherwise(
    ranks: GetRanks, tmp_path: Path, saved: dict[str, Any], words: list[str]
) -> None:
    task = save_even_model(tmp_path / "task")
    config = json.loads((task / "config.json").read_text())
    (task / "config.json").write_text(json.dumps(config | {"quantization_config": saved}))
    sentence = refused(ranks, options(task, tmp_path / "run", "local"))
    assert str(task) in sentence and all(word in sentence for word in words)


def test_a_base_without_4_bit_products(ranks: GetRanks, tmp_path: Path) -> None:
    task = save_even_model(tmp_path / "task")
    (task / "config.json").unlink()
    (task / "model.safetensors").unlink()
    GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=64, n_layer=1, n_head=2)).save_pretrained(
        task
    )
    sentence = refused(ranks, options(task, tmp_path / "run", "local"))
    assert "Conv1D" in sentence and "--load_in_4bit" in sentence


def test_a_checkpoint_of_another_base(ranks: GetRanks, task: Path, tmp_path: Path) -> None:
    """The same model, dense or in other 4 bits, is another base."""
    case = options(task, tmp_path / "run", "local", max_steps=4)
    ranks(1).run(tiny_runs.train, case)
    there = {
        "output_dir": tmp_path / "there",
        "resume_from_checkpoint": tmp_path / "run/checkpoint-4",
    }
    for others, word in (
        ({"bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"load_in_4bit": False}, "4bit"),
    ):
        dense = {"merge_target": "carry"} if "load_in_4bit" in others else {}
        ((sentence, status, _),) = ranks(1).run(tiny_runs.refusal, case | there | others | dense)
        assert status == 2 and word in sentence
