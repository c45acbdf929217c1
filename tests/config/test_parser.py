"""Options from YAML and the command line, DeepSpeed's JSON, and a sentence for every mistake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from scalora_dist.config.method import MethodArguments
from scalora_dist.config.options import Options
from scalora_dist.config.parser import parse_options
from scalora_dist.errors import UserError
from tests.support.refusals import one_sentence

OUTPUT = ["--output_dir", "out"]


def refused(*words: str) -> str:
    with pytest.raises(UserError) as error:
        parse_options([*OUTPUT, *words])
    return one_sentence(error)


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """``recipe(text)``: the words that read a YAML file with that text."""

    def write(text: str | bytes) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--config", str(path)]

    return write


# --- where values come from ----------------------------------------------------------------------


def test_the_command_line_overrides_the_recipe_and_that_the_defaults(recipe: Any) -> None:
    words = recipe(
        "rank: 4\nlearning_rate: 2e-4\ntarget_modules: [q_proj, v_proj]\nbf16: true\n"
        "save_model: false\noutput_dir: from_yaml\nmax_steps: -1\nmodel_name_or_path: null\n"
    )
    options = parse_options([*words, "--learning_rate", "1e-3", "--bf16", "false"])
    assert isinstance(options, Options)
    assert options.method.rank == 4
    assert options.method.target_modules == ["q_proj", "v_proj"]
    assert options.train.learning_rate == 1e-3
    assert options.train.bf16 is False
    assert options.train.save_model is False
    assert options.train.output_dir == "from_yaml"
    assert options.method.lora_alpha == MethodArguments().lora_alpha
    assert options.model.model_name_or_path is None
    assert options.launch.config == words[1]


def test_the_order_of_words_does_not_matter(recipe: Any) -> None:
    words = recipe("rank: 4\nlora_alpha: 3\n")
    for argv in ([*words, *OUTPUT, "--rank=5"], [*OUTPUT, "--rank", "5", *words]):
        options = parse_options(argv)
        assert (options.method.rank, options.method.lora_alpha) == (5, 3.0)


def test_the_launchers_local_rank_is_taken() -> None:
    assert parse_options([*OUTPUT, "--local_rank=1"]).launch.local_rank == 1


def test_help_groups_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_options(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    groups = re.split(r"^(\w+):$", text, flags=re.MULTILINE)
    blocks = dict(zip(groups[1::2], groups[2::2], strict=True))
    for group, fields in {
        "model": ["model_name_or_path", "attn_implementation"],
        "data": ["dataset", "max_length"],
        "method": ["method", "rank", "scaling_rule", "scale_bounds"],
        "training": ["learning_rate", "output_dir", "seed"],
        "launch": ["config", "ds_config"],
    }.items():
        for name in fields:
            assert [g for g, b in blocks.items() if re.search(rf"--{name}[ ,]", b)] == [group]
    assert "ScaLoRA-I" in text  # options are explained
    explained = " ".join(text.partition("--sb_eta {")[2].partition("--start_samples")[0].split())
    assert "paper: the learning rate" in explained
    assert "lr / (warmup_ratio × steps of 3 examples)" in explained


# --- scale bounds --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        (["none"], None),
        (["None"], None),
        (["0.1", "2"], (0.1, 2.0)),
        (["1", "1"], (1.0, 1.0)),
        ([], (0.05, 5.0)),
    ],
)
def test_scale_bounds(given: list[str], bounds: tuple[float, float] | None) -> None:
    words = ["--scale_bounds", *given] if given else []
    assert parse_options([*OUTPUT, *words]).method.bounds == bounds


@pytest.mark.parametrize(
    ("text", "bounds"), [("[0.1, 2]", (0.1, 2.0)), ("none", None), ("[none]", None)]
)
def test_scale_bounds_in_yaml(recipe: Any, text: str, bounds: tuple[float, float] | None) -> None:
    words = recipe(f"scale_bounds: {text}\n")
    assert parse_options([*OUTPUT, *words]).method.bounds == bounds


@pytest.mark.parametrize(
    "given", ["1", "0 5", "-1 5", "2 5", "0.1 0.5", "5 0.05", "0.1 inf", "nan 5", "a b", "1 2 3"]
)
def test_bad_scale_bounds(given: str) -> None:
    message = refused("--scale_bounds", *given.split())
    assert given in message and "none" in message


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["--learnin_rate", "--learnin_rate=3"])
def test_an_unknown_option_names_the_one_that_is_meant(word: str) -> None:
    message = refused(word, "3")
    assert "'learnin_rate'" in message and "did you mean learning_rate?" in message


@pytest.mark.parametrize("word", ["--lora_r", "--deepspeed"])
def test_an_option_of_another_trainer_names_all_of_ours(word: str) -> None:
    message = refused(word, "8")
    assert "did you mean" not in message
    assert all(f" {name}," in message for name in ("rank", "ds_config"))


def test_an_unknown_option_of_the_recipe_names_the_one_that_is_meant(recipe: Any) -> None:
    words = recipe("rank: 4\nscaling_rul: nnls\n")
    message = refused(*words)
    assert "did you mean scaling_rule?" in message and words[1] in message


@pytest.mark.parametrize("name", ["no_such_thing", "help", "3"])
def test_no_nonsense_in_the_recipe(recipe: Any, name: str) -> None:
    assert f"unknown option '{name}'" in refused(*recipe(f"{name}: 1\n"))


@pytest.mark.parametrize("words", [["rank"], ["-r", "3"]])
def test_a_stray_word_is_a_mistake(words: list[str]) -> None:
    assert words[0].lstrip("-") in refused(*words)


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("scaling_rule", ["paper", "scalar", "nnls", "adamw"]),
        ("merge_rounding", ["split", "nearest"]),
        ("merge_target", ["weight", "carry"]),
        ("sb_eta", ["paper", "code"]),
        ("bnb_4bit_quant_type", ["nf4", "fp4"]),
        ("lr_scheduler_type", ["linear", "cosine", "constant"]),
    ],
)
def test_an_unknown_choice_names_the_choices(recipe: Any, field: str, choices: list[str]) -> None:
    words = recipe(f"{field}: foo\n")
    for message in (refused(f"--{field}", "foo"), refused(*words)):
        assert field in message and "'foo'" in message
        assert all(choice in message for choice in choices)
    assert words[1] in message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("rank: 8\nmethod: x: y\n", 2),
        ("rank: 8\nlora_alpha: [1,\nmethod: x: y\n", 3),
        ("rank: 8\n\tmethod: lora\n", 2),
    ],
)
def test_malformed_yaml_tells_its_line(recipe: Any, text: str, line: int) -> None:
    words = recipe(text)
    assert f"{words[1]} line {line}: " in refused(*words)


def test_a_field_that_is_there_twice(recipe: Any) -> None:
    words = recipe("rank: 4\nlora_alpha: 8\nrank: 8\n")
    assert f"{words[1]} line 3: rank is there twice: remove one" in refused(*words)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- rank\n", "rank\n", "8\n"])
def test_a_recipe_without_fields(recipe: Any, text: str) -> None:
    assert "`option: value`" in refused(*recipe(text))


@pytest.mark.parametrize(
    "text",
    [
        b"rank: \x01\n",
        b"rank: \xff\n",
    ],
)
def test_a_recipe_that_is_no_text(recipe: Any, text: bytes) -> None:
    words = recipe(text)
    assert words[1] in refused(*words)


@pytest.mark.parametrize("path", ["no/such.yaml", "."])
def test_a_recipe_that_cannot_be_read(path: str) -> None:
    assert f"--config {path}: " in refused("--config", path)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("rank: eight", "rank"),
        ("rank: 8.5", "rank"),
        ("learning_rate: fast", "learning_rate"),
        ("bf16: maybe", "bf16"),
        ("target_modules: []", "target_modules"),
    ],
)
def test_a_wrong_type_in_the_recipe(recipe: Any, text: str, field: str) -> None:
    words = recipe(text)
    message = refused(*words)
    assert field in message and words[1] in message


@pytest.mark.parametrize(("field", "value"), [("rank", "x"), ("learning_rate", "y"), ("seed", "")])
def test_a_wrong_type_on_the_command_line(field: str, value: str) -> None:
    assert field in refused(f"--{field}", value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", "0"),
        ("scaling_interval", "0"),
        ("eta_lipschitz", "0"),
        ("eta_lipschitz", "nan"),
        ("lora_dropout", "1"),
        ("lora_dropout", "-0.1"),
        ("per_device_train_batch_size", "0"),
        ("gradient_accumulation_steps", "0"),
        ("logging_steps", "0"),
        ("lora_alpha", "0"),
        ("eta_lipschitz", "inf"),
        ("learning_rate", "-1"),
        ("per_device_eval_batch_size", "0"),
        ("update_rank_layers", "-1"),
        ("warmup_ratio", "1.5"),
    ],
)
def test_a_value_out_of_range(recipe: Any, field: str, value: str) -> None:
    assert f"--{field} " in refused(f"--{field}", value)
    # The recipe's values are checked after the command line has overridden them.
    words = recipe(f"{field}: {value}\n")
    assert f"--{field} " in refused(*words)
    fine = "0.5" if field.startswith(("eta", "lora", "warmup")) else "3"
    assert parse_options([*OUTPUT, *words, f"--{field}", fine])


def test_bf16_and_fp16_exclude_each_other() -> None:
    message = refused("--bf16", "--fp16")
    assert "--bf16" in message and "--fp16" in message


def test_the_etas_of_lora_sb(recipe: Any) -> None:
    """That of the public code is a learning rate of the warm-up."""
    assert parse_options(OUTPUT).method.sb_eta == "paper"
    words = ["--method", "lora-sb", "--sb_eta", "code"]
    for given in (words, [*recipe("sb_eta: code\nwarmup_ratio: 0\n"), *words[:2]]):
        message = refused(*given)
        assert "--sb_eta code" in message and "set --warmup_ratio" in message
        assert parse_options([*OUTPUT, *given, "--warmup_ratio", "0.02"]).method.sb_eta == "code"


def test_output_dir_is_needed() -> None:
    with pytest.raises(UserError) as error:
        parse_options([])
    assert "--output_dir" in one_sentence(error)
