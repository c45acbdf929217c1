"""DeepSpeed's JSON: what is filled in, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scalora_dist.config.training import TrainArguments
from scalora_dist.engines.ds_config import load_ds_config
from scalora_dist.errors import UserError
from tests.support.refusals import one_sentence

DS_CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
FOR_12B = {"zero3_12b", "zero3_12b_offload"}  # bf16, with sizes of their own


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


def test_compiled_blocks_are_refused_where_a_block_gathers() -> None:
    """Here, so that a plan refuses what a run does."""
    paths = {path.stem: str(path) for path in DS_CONFIGS}
    assert load(paths["zero2"], torch_compile=True)
    with pytest.raises(UserError, match="--torch_compile: ZeRO-3"):
        load(paths["zero3"], torch_compile=True)


def test_there_is_a_config_for_every_stage() -> None:
    assert {path.stem for path in DS_CONFIGS} >= {"zero0", "zero1", "zero2", "zero3"}
    assert {path.stem for path in DS_CONFIGS} >= {"zero3_offload", "zero3_hpz", *FOR_12B}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path, world_size: int, precision: dict[str, bool]) -> None:
    stage = json.loads(path.read_text())["zero_optimization"]["stage"]
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}
    if precision.get("fp16") and stage == 0:
        assert "stage 0" in ds_refused(str(path), fp16=True)
        return
    if path.stem in FOR_12B and not precision.get("bf16"):
        assert "bf16.enabled" in ds_refused(str(path), **precision)
        return
    config = load(str(path), world_size, max_grad_norm=0.7, **sizes, **precision)
    assert '"auto"' not in json.dumps(config)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 5
    assert config["train_batch_size"] == 15 * world_size
    assert config["gradient_clipping"] == 0.7
    assert config["bf16"]["enabled"] is precision.get("bf16", False)
    assert config["fp16"]["enabled"] is precision.get("fp16", False)
    sums = (
        config.get("data_types", {}).get("grad_accum_dtype"),
        config.get("communication_data_type"),
    )
    assert sums == (("fp32", "fp32") if stage >= 2 else (None, None))
    if stage == 3 and path.stem not in FOR_12B:
        assert config["zero_optimization"]["reduce_bucket_size"] == 576**2


@pytest.mark.floors
@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_deepspeed_takes_the_shipped_configs(path: Path) -> None:
    """DeepSpeed's own checks, as it makes them where there is one rank."""
    runtime = pytest.importorskip("deepspeed.runtime.config")
    config = load(str(path), world_size=1, per_device_train_batch_size=3, bf16=True)
    read = runtime.DeepSpeedConfig(config)
    if read.zero_optimization_stage >= 2:
        assert runtime.DtypeEnum(read.grad_accum_dtype).value == torch.float32
        assert read.communication_data_type == torch.float32
    assert read.zero_optimization_stage == config["zero_optimization"]["stage"]
    assert read.train_batch_size == 3
    assert read.gradient_clipping == config["gradient_clipping"]


def test_a_minimal_config_is_filled_in(tmp_path: Path) -> None:
    config = load(written(tmp_path / "ds.json", {}), max_grad_norm=0.5)
    assert config["train_batch_size"] == 2 and config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"] is False


@pytest.mark.parametrize("path", ["no/such.json", "."])
def test_a_config_that_cannot_be_read(path: str) -> None:
    assert "give a file, or one of zero0" in ds_refused(path)


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
        (zero(3, zero_hpz_partition_size=4), {"world_size": 6}, "does not divide 6 ranks"),
        (zero(2, zero_hpz_partition_size=2), {}, "needs stage 3"),
        (zero(3, zero_quantized_weights=True), {}, "zero_quantized_weights"),
        (zero(3, zero_quantized_gradients=True), {}, "zero_quantized_gradients"),
        (zero(3, mics_shard_size=2), {}, "mics_shard_size"),
        (zero(2) | {"torch_autocast": {"enabled": True}}, {}, "torch_autocast"),
        (zero(2, zenflow={"topk_ratio": 0.1}), {}, "zenflow"),
        (zero(3, offload_param=NVME), {}, "NVMe"),
        (zero(0, offload_optimizer={"device": "cpu"}), {}, "stage 1, 2 or 3"),
        (zero(3, offload_optimizer={"super_offload": True}), {}, "super_offload"),
        (zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}), {}, "ratio below 1"),
        (zero(3, offload_optimizer=NVME), {}, "NVMe"),
        (zero(1) | {"tensor_parallel": {"autotp_size": 2}}, {}, "tensor_parallel"),
        *(
            (zero(1) | {"data_types": {"grad_accum_dtype": name}}, {dtype: True}, "stage 2 or 3")
            for name in ("fp32", "torch.float32")
            for dtype in ("bf16", "fp16")
        ),
        (
            zero(2) | {"data_types": {"grad_accum_dtype": "bf16"}},
            {"bf16": True},
            "grad_accum_dtype",
        ),
        (
            zero(3) | {"data_types": {"grad_accum_dtype": "fp16"}},
            {"fp16": True},
            "grad_accum_dtype",
        ),
        (zero(2) | {"communication_data_type": "bf16"}, {"bf16": True}, "communication_data_type"),
        (zero(3) | {"communication_data_type": "fp16"}, {}, "communication_data_type"),
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
        zero(2, zero_hpz_partition_size=1),
        zero(3, zero_hpz_partition_size=2),
        zero(3, zero_hpz_partition_size=8),  # one group of the two ranks
        zero(2, round_robin_gradients=False),
        zero(3, offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"}),
        zero(1) | {"tensor_parallel": {"autotp_size": 1}},
        zero(2) | {"data_types": {"grad_accum_dtype": "fp32"}},
        zero(3) | {"data_types": {"grad_accum_dtype": "auto"}, "communication_data_type": "auto"},
        zero(2) | {"communication_data_type": "FP32"},
        zero(1) | {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "fp32"},
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
