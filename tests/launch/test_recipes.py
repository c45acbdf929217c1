"""The shipped recipes, and what they say of the papers' set-ups."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scalora_dist.config.parser import parse_options
from scalora_dist.training.resolve import resolve_batch

RECIPES = sorted((Path(__file__).parents[2] / "launch" / "recipes").glob("*.yaml"))
PAPER = {  # {recipe: (batch, epochs)}; appendices C.4 and C.5 of arXiv 2510.23818
    "gemma3_12b_metamath": (64, 2),
    "llama2_7b_commonsense": (16, 3),
    "llama3_8b_commonsense": (16, 3),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def test_they_are_there() -> None:
    assert {path.stem for path in RECIPES} == {"demo", *PAPER}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("ranks", [1, 2, 16])
def test_they_mean_the_same_on_any_number_of_ranks(path: Path, ranks: int) -> None:
    options = parse_options(["--config", str(path), "--output_dir", "out"])
    if path.stem == "demo":
        assert options.data.dataset == "reasoning_gym:word_sequence_reversal"
        return
    method, train = options.method, resolve_batch(options.train, ranks)
    assert (train.train_batch_size, train.num_train_epochs) == PAPER[path.stem]
    at_once = ranks * train.per_device_train_batch_size
    assert train.gradient_accumulation_steps * at_once == PAPER[path.stem][0]
    assert (method.name, method.interval, method.target_modules) == ("scalora", 10, PROJECTIONS)
    assert (method.rank, method.lora_alpha, method.lora_dropout) == (8, 16.0, 0.05)
    assert (train.lr_scheduler_type, train.warmup_ratio) == ("cosine", 0.03)
    assert train.bf16 and train.gradient_checkpointing and options.data.max_length == 256


@pytest.mark.parametrize("path", [path for path in RECIPES if "llama" in path.stem])
def test_eight_learning_rates_are_named(path: Path) -> None:
    text = path.read_text()
    table = text[text.index("Table 8's") : text.index("On the hub")]
    rates = dict(re.findall(r"([\w-]+) (\de-[45])", table))
    assert len(rates) == 8
    options = parse_options(["--config", str(path), "--output_dir", "out"])
    assert options.train.learning_rate == float(rates["PIQA"])
    assert f"--learning_rate {rates['PIQA']}" in text
