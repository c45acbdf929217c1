"""FSDP's settings: what is filled in, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scalora_dist.config.training import TrainArguments
from scalora_dist.engines.fsdp_config import FSDPConfig, load_fsdp_config
from scalora_dist.errors import UserError
from tests.support.refusals import one_sentence

EVERYTHING = {
    "mesh_shape": [2, 2],
    "reshard_after_forward": False,
    "mixed_precision": {"param_dtype": "bf16", "reduce_dtype": "bf16"},
    "cpu_offload": True,
}


SHIPPED = sorted((Path(__file__).parents[2] / "launch" / "fsdp").glob("*.yaml"))


def load(path: Path | None, *, ranks: int = 4, **values: Any) -> FSDPConfig:
    args = TrainArguments(output_dir="out", **values)
    return load_fsdp_config(str(path) if path else None, args, world_size=ranks)


def written(folder: Path, config: Any) -> Path:
    path = folder / "fsdp.yaml"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def refused(path: Path, **values: Any) -> str:
    with pytest.raises(UserError) as error:
        load(path, **values)
    message = one_sentence(error)
    assert str(path) in message
    return message


@pytest.mark.parametrize("ranks", [1, 3])
def test_without_a_file_blocks_are_cut_over_all_ranks(ranks: int) -> None:
    assert load(None, ranks=ranks) == FSDPConfig(
        mesh=[ranks],
        reshard_after_forward=True,
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        cpu_offload=False,
    )


def test_bf16_sums_gradients_in_fp32() -> None:
    config = load(None, bf16=True)
    assert (config.param_dtype, config.reduce_dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    "text",
    [json.dumps(EVERYTHING), json.dumps(EVERYTHING, indent="\t"), yaml.safe_dump(EVERYTHING)],
    ids=["json", "json with tabs", "yaml"],
)
def test_a_file_decides_everything(tmp_path: Path, text: str) -> None:
    assert load(written(tmp_path, text)) == FSDPConfig(
        mesh=[2, 2],
        reshard_after_forward=False,
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.bfloat16,
        cpu_offload=True,
    )


@pytest.mark.parametrize("config", [{}, dict.fromkeys(EVERYTHING)])
def test_what_is_absent_or_null_is_at_its_default(tmp_path: Path, config: dict[str, None]) -> None:
    assert load(written(tmp_path, config)) == load(None)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path) -> None:
    mesh = yaml.safe_load(path.read_text()).get("mesh_shape", [4])
    assert load(path, ranks=math.prod(mesh), bf16=True).mesh == mesh
    assert {path.stem for path in SHIPPED} >= {"hybrid", "hybrid_12b", "mixed", "offload"}


@pytest.mark.parametrize("mesh", [[4], [1, 4], [2, 2], [4, 1]])
def test_meshes_of_four_ranks(tmp_path: Path, mesh: list[int]) -> None:
    assert load(written(tmp_path, {"mesh_shape": mesh})).mesh == mesh


@pytest.mark.parametrize(
    ("mesh", "group"), [([4], 2), ([4], 4), ([2, 2], 2), ([4], True), ([4], False)]
)
def test_weights_may_stay_cut_up_over_fewer_ranks(
    tmp_path: Path, mesh: list[int], group: int
) -> None:
    config = load(written(tmp_path, {"mesh_shape": mesh, "reshard_after_forward": group}))
    assert config.reshard_after_forward is group


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"mesh": [4]}, "unknown key 'mesh'"),
        ({1: 2}, "unknown key"),
        ({"mesh_shape": [2]}, "[replicas, ranks of each]"),
        ({"mesh_shape": [2, 3]}, "the 4 ranks"),
        ({"mesh_shape": [-2, -2]}, "the 4 ranks"),
        ({"mesh_shape": [1, 2, 2]}, "the 4 ranks"),
        ({"mesh_shape": []}, "the 4 ranks"),
        ({"mesh_shape": 0}, "the 4 ranks"),
        ({"mesh_shape": 4}, "set [4]"),
        ({"mesh_shape": ["4"]}, "set [4]"),
        ({"mesh_shape": [True, 4]}, "set [4]"),
        ({"mesh_shape": [2.0, 2]}, "set [4]"),
        ({"reshard_after_forward": "yes"}, "true or false"),
        ({"reshard_after_forward": 2.0}, "true or false"),
        ({"reshard_after_forward": 1}, "a divisor of 4"),
        ({"reshard_after_forward": 0}, "a divisor of 4"),
        ({"reshard_after_forward": 3}, "a divisor of 4"),
        ({"reshard_after_forward": 8}, "a divisor of 4"),
        ({"mesh_shape": [2, 2], "reshard_after_forward": 4}, "a divisor of 2"),
        ({"cpu_offload": 1}, "cpu_offload"),
        ({"cpu_offload": "false"}, "cpu_offload"),
        ({"mixed_precision": "bf16"}, "param_dtype and reduce_dtype"),
        ({"mixed_precision": False}, "param_dtype and reduce_dtype"),
        ({"mixed_precision": {"output_dtype": "bf16"}}, "param_dtype and reduce_dtype"),
        ({"mixed_precision": {"param_dtype": "fp16"}}, "set fp32 or bf16"),
        ({"mixed_precision": {"param_dtype": ["bf16"]}}, "set fp32 or bf16"),
        ({"mixed_precision": {"reduce_dtype": 32}}, "reduce_dtype"),
    ],
)
def test_a_value_that_cannot_be(tmp_path: Path, config: dict[Any, Any], says: str) -> None:
    assert says in refused(written(tmp_path, config))


def test_bf16_weights_are_computed_with_in_bf16(tmp_path: Path) -> None:
    path = written(tmp_path, {"mixed_precision": {"param_dtype": "fp32"}})
    assert "param_dtype is bf16" in refused(path, bf16=True)


def test_there_is_no_fp16() -> None:
    with pytest.raises(UserError, match="--bf16"):
        load(None, fp16=True)


@pytest.mark.parametrize("text", ["", "3", "[4]", "fsdp"])
def test_a_file_without_keys(tmp_path: Path, text: str) -> None:
    assert "JSON object" in refused(written(tmp_path, text))


@pytest.mark.parametrize("text", ["a: b: c", '{"mesh_shape": [4', "? [a]\n: 1", "\x00"])
def test_a_file_that_is_neither_json_nor_yaml(tmp_path: Path, text: str) -> None:
    assert "neither JSON nor YAML" in refused(written(tmp_path, text))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "fsdp.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert "neither JSON nor YAML" in refused(path)


@pytest.mark.parametrize("name", ["none.yaml", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    refused(tmp_path / name)
