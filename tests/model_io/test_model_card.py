"""The model card: its head is what the hub reads, and it says only what may be uploaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from scalora_dist.config.options import Options
from scalora_dist.config.parser import parse_options
from scalora_dist.config.words import option_words
from scalora_dist.model_io.model_card import BASE, NAME, THIS, Kind, code, hub_name, model_card
from tests.support import tiny_models

VERSIONS = {"scalora_dist": "0.2.0", "torch": "2.13.0+cpu"}
SUMMARY: dict[str, Any] = {
    "rank": 4,
    "trained_parameters": 1234567,
    "world_size": 2,
    "steps": 1000,
    "skipped_steps": 3,
    "loss_first": 4.25,
    "loss_last": 0.5,
    "eval_examples": 100,
    "eval_loss": [4.396, 0.083],
    "eval_exact_match": [0.0, 0.85],
    "update_rank": [17, 21],
    "carry": {},
}
# Whatever a folder or a file may be called.
NASTY = [
    "a: b # c",
    "- x",
    "`quoted`",
    "a|b",
    "---",
    "line\nbreak",
    "{{ x }}",
    "'\"",
    "ß→中",
    "[1](2)",
]


def options(**others: Any) -> Options:
    given = {
        "model_name_or_path": "org/base-1b",
        "dataset": "org/some-data",
        "output_dir": "/home/someone/runs/mine",
        "max_steps": 1000,
        "rank": 4,
        **others,
    }
    values = {name: value for name, value in given.items() if value is not None}
    return parse_options([word for each in values.items() for word in option_words(*each)])


def loaded(text: str, folder: Path) -> ModelCard:
    """The card as huggingface_hub reads it from a folder's README.md."""
    (folder / NAME).write_text(text, encoding="utf-8")
    return ModelCard.load(folder / NAME)


def block(text: str, language: str) -> str:
    found = re.search(rf"^(`{{3,}}){language}\n(.*?)\n\1$", text, re.MULTILINE | re.DOTALL)
    assert found, text
    return found[2]


@pytest.mark.parametrize(
    ("kind", "library", "relation"),
    [("model", "transformers", "finetune"), ("adapter", "peft", "adapter")],
)
def test_the_head_is_what_the_hub_reads(
    kind: Kind, library: str, relation: str, tmp_path: Path
) -> None:
    card = loaded(model_card(kind, options(), SUMMARY, VERSIONS), tmp_path)
    assert card.data.to_dict() == {
        "base_model": "org/base-1b",
        "base_model_relation": relation,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["scalora_dist", "scalora"],
        "datasets": ["org/some-data"],
    }


def test_results_are_told_and_unknown_ones_are_not() -> None:
    full = model_card("model", options(), SUMMARY, VERSIONS)
    for row in (
        "| held-out loss (100 examples), before → after | 4.396 → 0.083 |",
        "| held-out exact match (100 examples) | 0.0% → 85.0% |",
        "| training loss, first → last step | 4.250 → 0.500 |",
        "| steps | 1,000 (3 skipped) |",
        "| trained parameters | 1,234,567 |",
        "| rank of the accumulated update (2 layers measured) | 17 to 21, mean 19 |",
        "| `torch` | `2.13.0+cpu` |",
    ):
        assert row in full.splitlines()
    unknown: dict[str, Any] = {
        "eval_loss": None,
        "eval_exact_match": None,
        "update_rank": [],
        "loss_first": None,
    }
    partly = model_card("model", options(), {"steps": 4, "loss_last": 0.5} | unknown, VERSIONS)
    assert "| training loss, last step | 0.500 |" in partly.splitlines()
    assert "None" not in partly and "held-out" not in partly and "accumulated" not in partly
    nothing = model_card("model", options(), {}, {})
    assert "## Results" not in nothing and "## Versions" not in nothing
    assert "not finite → 2.000" in model_card("model", options(), {"eval_loss": [None, 2.0]}, {})


@pytest.mark.parametrize("method", ["scalora", "lora", "relora", "lora-sb", "full"])
def test_the_settings_are_a_recipe_of_the_run(method: str, tmp_path: Path) -> None:
    """Read again, they give the options that decide the numbers, those of the method included."""
    own: dict[str, Any] = {} if method == "full" else {"rank": 3, "lora_dropout": 0.1}
    own |= {"scaling_interval": "auto", "scale_bounds": ["0.1", "4"]} if method == "scalora" else {}
    made = options(
        **{"rank": None, "method": method, "bf16": True, "seed": 7, "train_batch_size": 8} | own,
        prompt_template="Q: {q}\\n```A:",
        completion_template="{a}",
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(block(model_card("model", made, SUMMARY, VERSIONS), "yaml"))
    assert ("rank" in yaml.safe_load(recipe.read_text())) == (method != "full")
    again = parse_options(["--config", str(recipe), "--output_dir", str(made.train.output_dir)])
    groups = ("model", "data", "method", "train")
    assert [getattr(again, name) for name in groups] == [getattr(made, name) for name in groups]


def test_no_path_of_the_machine_is_in_a_card(tmp_path: Path) -> None:
    """Neither of the base, nor of the data, the adapter, the output."""
    base, data = tmp_path / "private" / "my-base", tmp_path / "private" / "my-data.jsonl"
    base.mkdir(parents=True)
    data.touch()
    case = options(
        model_name_or_path=f"{base}/", dataset=data, eval_dataset=data, adapter_name_or_path=base
    )
    kinds: tuple[Kind, ...] = ("model", "adapter")
    for kind in kinds:
        text = model_card(kind, case, SUMMARY | {"output_dir": str(tmp_path)}, VERSIONS)
        assert "private" not in text and str(tmp_path) not in text and "someone" not in text
        assert text.count("my-base") >= 2 and text.count("my-data.jsonl") >= 2
        head = loaded(text, tmp_path).data
        assert not {"base_model", "base_model_relation", "datasets"} & head.to_dict().keys()


@pytest.mark.parametrize("name", NASTY)
def test_no_name_breaks_the_card(name: str, tmp_path: Path) -> None:
    case = options(
        model_name_or_path=f"/models/{name}",
        dataset=f"/data/{name}",
        prompt_template=name,
        completion_template="```",
    )
    text = model_card("adapter", case, SUMMARY, VERSIONS)
    card = loaded(text, tmp_path)
    assert card.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["scalora_dist", "scalora"],
    }
    prose = card.text.replace(block(text, "yaml"), "").replace(block(text, "python"), "")
    assert re.findall(r"^#+ ", prose, re.MULTILINE) == ["# ", "## ", "## ", "## ", "## "]
    settings = yaml.safe_load(block(text, "yaml"))
    assert settings["model_name_or_path"] == settings["dataset"] == name
    assert settings["prompt_template"] == name


def test_code_is_closed_by_ticks_that_the_text_has_not() -> None:
    assert code("a`b") == "``a`b``"
    assert code("`a``") == "``` `a`` ```"
    assert code("a|b\nc") == "`a\\|b c`"


def test_what_is_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/local").mkdir(parents=True)
    assert hub_name("org/name") == "org/name" and hub_name("gpt2") == "gpt2"
    local = ("org/local", "./org/name", "/a/b", "~/m", "a/b/c", "reasoning_gym:chain_sum")
    assert [hub_name(name) for name in local] == [None] * 6
    cached = "/root/.cache/huggingface/hub/models--org--a-name/snapshots/0123abc"
    assert hub_name(cached) == "org/a-name"


def test_an_approximating_adapter_says_so() -> None:
    text = model_card("adapter", options(adapter_rank=16), SUMMARY, VERSIONS)
    assert "approximation of rank 16" in text and "not of this adapter" in text
    assert "approximation" not in model_card("adapter", options(), SUMMARY, VERSIONS)
    assert "approximation" not in model_card("model", options(adapter_rank=16), SUMMARY, VERSIONS)


def test_its_code_loads_the_model_and_the_adapter(tmp_path: Path) -> None:
    """The lines are run, with the folders in place of the names."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_models.save_tiny_llama(base, tiny_models.byte_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(model, config).save_pretrained(str(adapter))
    cases: list[tuple[Kind, bool, Path, type]] = [
        ("model", True, base, type(model)),
        ("adapter", False, adapter, peft.PeftModel),
        ("adapter", True, adapter, peft.PeftModel),
    ]
    for kind, fourbit, folder, made in cases:
        case = options(model_name_or_path=base, bf16=True, load_in_4bit=fourbit)
        lines = block(model_card(kind, case, SUMMARY, VERSIONS), "python")
        lines = lines.replace(THIS[kind], str(folder)).replace(BASE, str(base))
        names: dict[str, Any] = {}
        exec(lines, names)
        assert issubclass(type(names["model"]), made)
        # The model is loaded in the dtype of its files, an adapter's base in the training's.
        dtype = torch.float32 if kind == "model" else torch.bfloat16
        assert names["model"].get_input_embeddings().weight.dtype == dtype
        weights = {type(module).__name__ for module in names["model"].modules()}
        assert ("Linear4bit" in weights) == (fourbit and kind == "adapter")
        assert names["tokenizer"]("abc").input_ids
