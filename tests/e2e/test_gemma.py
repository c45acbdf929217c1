"""A Gemma 3 that sees, as google/gemma-3-12b-pt is one: what of it is trained on text, and left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)

from tests.support import tiny_models, tiny_runs
from tests.support.ranks import Ranks
from tests.support.workers import adapter as work

GetRanks = Callable[[int], Ranks]
HEAVY = pytest.mark.heavy
SIGHT = ("model.vision_tower.", "model.multi_modal_projector.")
# Processors that transformers does not need for text, and servers want.
OTHER_FILES = ("preprocessor_config.json", "processor_config.json")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random one with an eye, whose linear layers are called as the language model's are."""
    folder: Path = tmp_path_factory.mktemp("seeing")
    torch.manual_seed(0)
    text = tiny_models.ODD_SIZES | {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 5,
        "query_pre_attn_scalar": 6,
        "final_logit_softcapping": None,
    }
    vision = {"hidden_size": 12, "intermediate_size": 14, "image_size": 8, "patch_size": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision | {"num_hidden_layers": 1, "num_attention_heads": 2},
        mm_tokens_per_image=4,
        boi_token_index=256,
        eoi_token_index=257,
        image_token_index=258,
        tie_word_embeddings=True,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    assert "vocab_size" not in json.loads((folder / "config.json").read_text())
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.save_pretrained(folder)
    for name in OTHER_FILES:
        (folder / name).write_text('{"processor_class": "Gemma3Processor"}')
    tiny_models.save_texts(folder, "abc ", longest=24, count=41)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(loaded) is Gemma3ForConditionalGeneration
    return loaded.state_dict()


@pytest.mark.floors
@pytest.mark.parametrize(
    ("engine", "others"),
    [
        ("local", {"method": "lora"}),
        ("zero3", {"adapter_rank": 24}),
        pytest.param("fsdp", {"adapter_rank": 24}, marks=HEAVY),
        pytest.param("fsdp", {"method": "lora", "gradient_checkpointing": True}, marks=HEAVY),
        pytest.param("fsdp", {"bf16": True, "gradient_checkpointing": True}, marks=HEAVY),
        pytest.param("zero2", {}, marks=HEAVY),
        pytest.param("zero3", {"target_modules": "q_proj mlp.up_proj"}, marks=HEAVY),
        pytest.param("zero3", {"bf16": True, "gradient_checkpointing": True}, marks=HEAVY),
        pytest.param("local", {"method": "full", "weight_decay": 0.5}, marks=HEAVY),
        pytest.param("zero3", {"method": "full", "weight_decay": 0.5}, marks=HEAVY),
        pytest.param("fsdp", {"method": "full", "weight_decay": 0.5}, marks=HEAVY),
    ],
)
def test_its_language_model_is_trained_and_all_of_it_left(
    ranks: GetRanks, seeing: Path, tmp_path: Path, engine: str, others: dict[str, Any]
) -> None:
    """2 steps; the model that is left loads as the base does, and sees as it did."""
    run = tmp_path / "run"
    given: dict[str, Any] = {"max_steps": 2, "save_model": True, "lora_dropout": 0.0}
    if others.get("method") == "full":
        given |= dict.fromkeys(("rank", "lora_alpha", "lora_dropout"))
    case = work.options(seeing, run, engine, **given | others)
    trained = ranks(work.size(engine)).run(work.train, case)[0]
    close = 0.2 if "bf16" in others else 1e-4
    assert work.differ(trained, work.logits(work.base(seeing))) > 2 * close
    assert work.differ(work.logits(work.base(run / "model")), trained) < close
    assert all((run / "model" / name).is_file() for name in OTHER_FILES)

    before, after = weights(seeing), weights(run / "model")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.startswith(SIGHT):
            dtype = torch.bfloat16 if "bf16" in others else torch.float32
            assert torch.equal(after[name], tensor.to(dtype).float()), name
    changed = "model.language_model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(before[changed], after[changed])
    if others.get("method") == "lora" or "adapter_rank" in others:
        targets = work.config(run)["target_modules"]
        assert len(targets) == 14 and not any("vision" in name for name in targets)
        assert work.differ(work.by_peft(seeing, run), trained) < 1e-2


def test_an_eye_is_not_adapted_by_name(ranks: GetRanks, seeing: Path, tmp_path: Path) -> None:
    case = work.options(seeing, tmp_path / "run", target_modules="fc1")
    ((sentence, status, _),) = ranks(1).run(tiny_runs.refusal, case)
    assert status == 2 and "no part of the language model" in sentence
