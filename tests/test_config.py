"""Options from YAML and the command line, DeepSpeed's JSON, and a sentence for every mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scalora_dist.config import MethodArguments, Options, TrainArguments, parse_options
from scalora_dist.engines.ds_config import load_ds_config
from scalora_dist.errors import UserError

DS_CONFIGS = sorted((Path(__file__).parents[1] / "ds_configs").glob("*.json"))
OUTPUT = ["--output_dir", "out"]


def one_sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


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
def test_an_unknown_field_names_the_fields(word: str) -> None:
    message = refused(word, "3")
    assert "'learnin_rate'" in message and "did you mean learning_rate?" in message
    assert all(name in message for name in ("scaling_rule", "per_device_train_batch_size"))


def test_an_unknown_field_of_the_recipe_names_the_fields(recipe: Any) -> None:
    words = recipe("rank: 4\nscaling_rul: nnls\n")
    message = refused(*words)
    assert "did you mean scaling_rule?" in message and words[1] in message
    assert "per_device_train_batch_size" in message


@pytest.mark.parametrize("name", ["no_such_thing", "help", "3"])
def test_no_nonsense_in_the_recipe(recipe: Any, name: str) -> None:
    assert f"unknown field '{name}'" in refused(*recipe(f"{name}: 1\n"))


@pytest.mark.parametrize("words", [["rank"], ["-r", "3"]])
def test_a_stray_word_is_a_mistake(words: list[str]) -> None:
    assert words[0].lstrip("-") in refused(*words)


@pytest.mark.parametrize(
    "words",
    [
        ["--lora_alpha", "0"],
        ["--eta_lipschitz", "inf"],
        ["--learning_rate", "-1"],
        ["--per_device_eval_batch_size", "0"],
        ["--update_rank_layers", "-1"],
        ["--warmup_ratio", "1.5"],
    ],
)
def test_a_number_that_cannot_be(words: list[str]) -> None:
    assert words[0] in refused(*words)


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("method", ["scalora", "lora"]),
        ("scaling_rule", ["paper", "scalar", "nnls"]),
        ("merge_rounding", ["split", "nearest"]),
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


@pytest.mark.parametrize("text", ["", "# nothing\n", "- rank\n", "rank\n", "8\n"])
def test_a_recipe_without_fields(recipe: Any, text: str) -> None:
    assert "`field: value`" in refused(*recipe(text))


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
    ],
)
def test_a_value_out_of_range(recipe: Any, field: str, value: str) -> None:
    assert f"--{field} " in refused(f"--{field}", value)
    # The recipe's values are checked after the command line has overridden them.
    words = recipe(f"{field}: {value}\n")
    assert f"--{field} " in refused(*words)
    fine = "0.5" if field.startswith(("eta", "lora")) else "3"
    assert parse_options([*OUTPUT, *words, f"--{field}", fine])


def test_bf16_and_fp16_exclude_each_other() -> None:
    message = refused("--bf16", "--fp16")
    assert "--bf16" in message and "--fp16" in message


def test_output_dir_is_needed() -> None:
    with pytest.raises(UserError) as error:
        parse_options([])
    assert "--output_dir" in one_sentence(error)


# --- DeepSpeed's JSON ----------------------------------------------------------------------------


def train_args(**values: Any) -> TrainArguments:
    return TrainArguments(output_dir="out", **values)


def written(path: Path, config: Any) -> str:
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


def load(path: str, world_size: int = 2, **values: Any) -> dict[str, Any]:
    return load_ds_config(path, train_args(**values), world_size=world_size, hidden_size=576)


def ds_refused(path: str, **values: Any) -> str:
    with pytest.raises(UserError) as error:
        load(path, **values)
    message = one_sentence(error)
    assert path in message
    return message


def test_there_is_a_config_for_every_stage() -> None:
    assert {path.stem for path in DS_CONFIGS} >= {"zero0", "zero1", "zero2", "zero3"}
    assert {path.stem for path in DS_CONFIGS} >= {"zero3_offload"}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path, world_size: int, precision: dict[str, bool]) -> None:
    stage = json.loads(path.read_text())["zero_optimization"]["stage"]
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}
    if precision.get("fp16") and stage == 0:
        assert "stage 0" in ds_refused(str(path), fp16=True)
        return
    config = load(str(path), world_size, max_grad_norm=0.7, **sizes, **precision)
    assert '"auto"' not in json.dumps(config)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 5
    assert config["train_batch_size"] == 15 * world_size
    assert config["gradient_clipping"] == 0.7
    assert config["bf16"]["enabled"] is precision.get("bf16", False)
    assert config["fp16"]["enabled"] is precision.get("fp16", False)
    if stage == 3:
        assert config["zero_optimization"]["reduce_bucket_size"] == 576**2


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_deepspeed_takes_the_shipped_configs(path: Path) -> None:
    """DeepSpeed's own checks, as it makes them where there is one rank."""
    runtime = pytest.importorskip("deepspeed.runtime.config")
    config = load(str(path), world_size=1, per_device_train_batch_size=3)
    read = runtime.DeepSpeedConfig(config)
    assert read.zero_optimization_stage == config["zero_optimization"]["stage"]
    assert read.train_batch_size == 3
    assert read.gradient_clipping == config["gradient_clipping"]


def test_a_minimal_config_is_filled_in(tmp_path: Path) -> None:
    config = load(written(tmp_path / "ds.json", {}), max_grad_norm=0.5)
    assert config["train_batch_size"] == 2 and config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"] is False


@pytest.mark.parametrize("path", ["no/such.json", "."])
def test_a_config_that_cannot_be_read(path: str) -> None:
    assert "ds_configs/" in ds_refused(path)


@pytest.mark.parametrize(
    ("text", "line"), [('{\n  "a": 1,\n}', 3), ('{"a": 1\n "b": 2}', 2), ("", 1), ("zero3", 1)]
)
def test_malformed_json_tells_its_line(tmp_path: Path, text: str, line: int) -> None:
    assert f"line {line} " in ds_refused(written(tmp_path / "ds.json", text))


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_a_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    assert "JSON object" in ds_refused(written(tmp_path / "ds.json", text))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"train_batch_size": 3}, "train_batch_size"),
        ({"gradient_clipping": 2.0}, "gradient_clipping"),
        ({"bf16": {"enabled": True}}, "bf16.enabled"),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
    ],
)
def test_a_value_that_contradicts_the_command_line(
    tmp_path: Path, config: dict[str, Any], key: str
) -> None:
    message = ds_refused(written(tmp_path / "ds.json", config))
    assert key in message and '"auto"' in message


def test_a_value_that_agrees_is_fine(tmp_path: Path) -> None:
    written(tmp_path / "ds.json", {"train_batch_size": 2, "gradient_clipping": 1})
    assert load(str(tmp_path / "ds.json"))["train_batch_size"] == 2


def test_nothing_may_stay_auto(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}
    path = written(tmp_path / "ds.json", config)
    assert "zero_optimization.sub_group_size" in ds_refused(path)


def zero(stage: int, **fields: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **fields}}


NVME = {"device": "nvme", "nvme_path": "/tmp"}


@pytest.mark.parametrize(
    ("config", "values", "says"),
    [
        (zero(0), {"fp16": True}, "stage 1, 2 or 3"),
        (zero(4), {}, "set 0, 1, 2 or 3"),
        (zero(2, round_robin_gradients=True), {}, "round_robin_gradients"),
        (zero(3, zero_quantized_nontrainable_weights=True), {}, "quantized_nontrainable"),
        (zero(3, zero_hpz_partition_size=2), {}, "zero_hpz_partition_size"),
        (zero(3, mics_shard_size=2), {}, "mics_shard_size"),
        (zero(2, zenflow={"topk_ratio": 0.1}), {}, "zenflow"),
        (zero(3, offload_param=NVME), {}, "NVMe"),
        (zero(0, offload_optimizer={"device": "cpu"}), {}, "stage 1, 2 or 3"),
        (zero(3, offload_optimizer={"super_offload": True}), {}, "super_offload"),
        (zero(3, offload_optimizer=NVME), {}, "NVMe"),
        (zero(1) | {"tensor_parallel": {"autotp_size": 2}}, {}, "tensor_parallel"),
        (
            zero(1) | {"data_types": {"grad_accum_dtype": "fp32"}},
            {"bf16": True},
            "stage 2 or 3",
        ),
        (zero(2) | {"bf16": {"check_grad_overflow": False}}, {"bf16": True}, "check_grad_overflow"),
        (zero(3, compute_grad_norm=False), {}, "compute_grad_norm"),
        (
            zero(2) | {"bf16": {"bf16_master_weights_and_grads": True}},
            {"bf16": True},
            "master_weights_and_grads",
        ),
        (
            zero(2) | {"fp16": {"fp16_master_weights_and_grads": True}},
            {"fp16": True},
            "master_weights_and_grads",
        ),
        ({"optimizer": {"type": "AdamW"}}, {}, "remove the 'optimizer' block"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "remove the 'scheduler' block"),
        pytest.param(
            {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
            {},
            "remove the 'optimizer' block",
        ),
    ],
)
def test_settings_that_would_break_the_rescale(
    tmp_path: Path, config: dict[str, Any], values: dict[str, Any], says: str
) -> None:
    assert says in ds_refused(written(tmp_path / "ds.json", config), **values)


@pytest.mark.parametrize(
    "config",
    [
        zero(3, zero_hpz_partition_size=1),
        zero(2, round_robin_gradients=False),
        zero(3, offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"}),
        zero(1) | {"tensor_parallel": {"autotp_size": 1}},
        zero(2) | {"data_types": {"grad_accum_dtype": "fp32"}},
    ],
)
def test_harmless_settings_are_taken(tmp_path: Path, config: dict[str, Any]) -> None:
    assert load(written(tmp_path / "ds.json", config))["zero_optimization"]["stage"] in (1, 2, 3)


@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimization": 3},
        {"zero_optimization": {"stage": 3, "offload_param": "cpu"}},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "2"}},
        {"bf16": True},
        {"data_types": "fp32"},
    ],
)
def test_a_section_of_a_wrong_type(tmp_path: Path, config: dict[str, Any]) -> None:
    ds_refused(written(tmp_path / "ds.json", config))
