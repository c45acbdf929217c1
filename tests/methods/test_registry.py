"""The registry of methods: what each reads, and a sentence for every mistake."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scalora_dist.config.method import MERGING, MethodArguments, MethodName
from scalora_dist.config.option import declaration_of, declarations
from scalora_dist.config.parser import parse_options
from scalora_dist.errors import UserError
from scalora_dist.methods.method import AddContext
from scalora_dist.methods.registry import METHODS
from tests.support import runs
from tests.support.refusals import one_sentence

# A value of each option that is not its default, as it is typed.
OTHERS: dict[str, str] = {
    "rank": "4",
    "lora_alpha": "3",
    "lora_dropout": "0.1",
    "target_modules": "q_proj",
    "scaling_rule": "nnls",
    "scaling_interval": "auto",
    "auto_threshold": "0.3",
    "eta_lipschitz": "0.2",
    "scale_bounds": "none",
    "merge_target": "carry",
    "carry_rank": "16",
    "carry_room": "12",
    "carry_limit": "0.5",
    "merge_rounding": "nearest",
    "alpha_variant": "II",
    "alpha_multiplier": "2",
    "lr_ratio": "4",
    "relora_interval": "7",
    "relora_prune": "0.5",
    "relora_warmup_steps": "3",
    "sb_eta": "code",
    "start_samples": "30",
    "start_memory": "32",
}
OPTIONS = [field.name for field, _ in declarations(MethodArguments) if field.name != "method"]
PEFTS = ("peft-lora", "dora", "hira", "pissa", "lora-ga")


def arguments(*words: str) -> MethodArguments:
    """With a warm-up, without which ``--sb_eta code`` is refused."""
    return parse_options(["--output_dir", "out", "--warmup_ratio", "0.1", *words]).method


def refused(*words: str) -> str:
    with pytest.raises(UserError) as error:
        arguments(*words)
    return one_sentence(error)


def not_added(*words: str) -> str:
    """Why a method's layers cannot be put into a model whose linear layers are all 8 × 8."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=1, **sizes))
    args = arguments(*words)
    with pytest.raises(UserError) as error:
        METHODS[args.name].add(model, AddContext(args, 0, torch.float32))
    return one_sentence(error)


def test_an_unknown_method_names_the_methods() -> None:
    sentence = refused("--method", "qlora")
    assert "--method" in sentence and "'qlora'" in sentence
    assert all(f"'{name}'" in sentence for name in METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_options_are_read_or_refused(method: str) -> None:
    """Each option at another value than its default: taken where it is read, else one sentence."""
    assert set(OTHERS) == set(OPTIONS)
    args = arguments("--method", method)
    for name, value in OTHERS.items():
        words = ("--method", method, f"--{name}", value)
        if args.reads(name):
            assert getattr(arguments(*words), name) != getattr(args, name)
        else:
            sentence = refused(*words)
            assert f"--method {method} " in sentence and f"--{name}" in sentence


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("lora", "lr_ratio"),
        ("lora", "scaling_rule"),
        ("lora", "relora_interval"),
        ("lora-plus", "alpha_variant"),
        ("lora-alpha", "lora_alpha"),
        ("lora-sb", "lora_alpha"),
        ("lora-xs", "start_samples"),
        ("lora-xs", "sb_eta"),
        ("lora-ga", "sb_eta"),
        ("mora", "lora_alpha"),
        ("full", "rank"),
        ("full", "target_modules"),
        ("full", "lora_dropout"),
        ("relora", "scaling_interval"),
        ("scalora", "relora_prune"),
    ],
)
def test_what_a_method_does_not_read(method: str, option: str) -> None:
    """Written out once more, so that a declaration that claims too much is noticed."""
    methods = declaration_of(MethodArguments, option).methods
    assert methods is not None and method not in methods


def test_methods_and_options_name_each_other() -> None:
    assert set(METHODS) == set(get_args(MethodName))
    assert {name for name, method in METHODS.items() if method.merges} == MERGING
    for name in OPTIONS:
        methods = declaration_of(MethodArguments, name).methods
        assert methods and methods <= set(METHODS), name


def test_an_option_at_its_default_may_be_given() -> None:
    default = MethodArguments().lr_ratio
    assert arguments("--method", "lora", "--lr_ratio", str(default)).name == "lora"


def test_lora_pro_refuses_fp16() -> None:
    engine: Any = SimpleNamespace(gradient_dtype=torch.float16)
    transform = METHODS["lora-pro"].transform
    assert transform is not None
    with pytest.raises(UserError) as error:
        transform(engine, None, parse_options(["--method", "lora-pro", "--output_dir", "-"]))
    sentence = one_sentence(error)
    assert (
        "--method lora-pro" in sentence
        and "fp16" in sentence
        and "--bf16" in sentence
        and "stage 2 or 3" in sentence
    )


@pytest.mark.parametrize(("method", "most"), [("lora", 8), ("pissa", 8), ("lora-ga", 4)])
def test_a_rank_that_does_not_fit_is_refused(method: str, most: int) -> None:
    """Before anything is computed; LoRA-GA takes 2 · rank directions of a gradient."""
    sentence = not_added("--method", method, "--rank", str(most + 1))
    assert f"rank {most + 1} " in sentence and f"set --rank between 1 and {most}," in sentence


@pytest.mark.parametrize("method", PEFTS)
def test_a_missing_peft_says_what_to_install(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    sentence = not_added("--method", method, "--rank", "2")
    assert re.search(r"pip install '?\w+\[peft\]", sentence), sentence


def test_the_extra_that_installs_peft_exists() -> None:
    """What the sentence above tells a user to type."""
    text = (runs.REPOSITORY / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert re.search(r'^peft = \[.*"peft', extras, re.MULTILINE)
