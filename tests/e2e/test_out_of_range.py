"""Data beyond a model's tables ends a run before its weights are read; a pad id never does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

from tests.support import runs, tiny_models, tiny_runs
from tests.support.ranks import Ranks

GetRanks = Callable[[int], Ranks]
LONGEST = 17


def save_task(folder: Path, *, tokens: tuple[str, ...] = (), pad: str | None = None) -> Path:
    """Save an OPT with fewer positions than ``max_length``, texts, and a tokenizer with more."""
    tokenizer = tiny_models.byte_tokenizer()
    config = OPTConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=LONGEST,
        **{"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "dropout": 0.0, "pad_token_id": 0},
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(folder)
    tiny_models.save_texts(folder, "abc", longest=LONGEST, count=41)  # with EOS
    return folder


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + json.dumps({"text": text}) + "\n")


@pytest.mark.parametrize(
    ("place", "text", "says"),
    [
        ("texts.jsonl", "a<new>b", "(<new>), but the model's embedding has 258 rows"),
        ("texts.jsonl", "a" * LONGEST, f"has 18 tokens, but the model has a table of {LONGEST}"),
        ("evaluation.jsonl", "a<new>b", "(<new>), but the model's embedding has 258 rows"),
    ],
)
def test_it_is_refused_before_the_weights_are_read(
    ranks: GetRanks, tmp_path: Path, place: str, text: str, says: str
) -> None:
    task = save_task(tmp_path / "task", tokens=("<new>",))
    (task / "model.safetensors").write_bytes(b"not read")
    (task / "evaluation.jsonl").write_text((task / "texts.jsonl").read_text())
    append(task / place, text)
    evaluation = {"eval_dataset": task / "evaluation.jsonl", "eval_size": 0}
    case = tiny_runs.options(task, tmp_path / "run", "zero3", **evaluation)
    for sentence, status, _ in ranks(2).run(tiny_runs.refusal, case):
        assert says in sentence and status == 2 and "\n" not in sentence
    assert not (tmp_path / "run").exists()


def test_neither_the_pad_id_nor_max_length_counts(ranks: GetRanks, tmp_path: Path) -> None:
    """Examples of all the model's positions, padded with a token beyond its embedding."""

    def losses(name: str, **others: Any) -> list[float]:
        task = save_task(tmp_path / name, **others)
        settings = {"max_steps": 2, "lora_dropout": 0.0, "method": "lora"}
        case = tiny_runs.options(task, tmp_path / f"run-{name}", "local", **settings)
        assert case["max_length"] > LONGEST
        ranks(1).run(tiny_runs.train, case)
        return runs.losses(Path(case["output_dir"]))

    assert losses("within") == losses("beyond", pad="<new>")
