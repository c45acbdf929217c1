"""The folder of an exported model against ``save_pretrained``'s of the same model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    dynamic_module_utils,
)

from scalora_dist.config.model import ModelArguments
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.engines.layer_shards import as_matrix
from scalora_dist.errors import UserError
from scalora_dist.model_io import export_model
from scalora_dist.model_io.base_weights import BaseWeights
from scalora_dist.model_io.export_model import ModelExport
from tests.support import families
from tests.support.refusals import one_sentence


class Loaded:
    """The parameters of a model of transformers, as an engine would give them."""

    adapted: Mapping[str, nn.Module] = {}
    rank, device = 0, torch.device("cpu")

    def __init__(self, model: PreTrainedModel) -> None:
        self.parameters = dict(model.named_parameters())
        self.loaded = self.parameters.keys()
        self.modules = dict(model.named_modules()).keys()

    def shape(self, name: str) -> torch.Size:
        return self.parameters[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.parameters[name].dtype

    def shard(self, name: str) -> FlatShard:
        tensor = self.parameters[name].detach()
        return FlatShard(tensor.reshape(-1), 0, as_matrix(tensor.shape))

    def dense(self, name: str, shard: FlatShard) -> Tensor:
        return shard.local.view(self.shape(name))


def export(
    base: Path, folder: Path, dtype: torch.dtype, to: torch.dtype | None = None
) -> PreTrainedModel:
    """Export a model that is as it was loaded. Returns it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    read = BaseWeights(ModelArguments(model_name_or_path=str(base)), dtype)
    tokenizer = AutoTokenizer.from_pretrained(base)
    made, loaded = ModelExport(read, to or dtype), Loaded(model)
    made.write(folder, loaded, made.gathered(loaded, ()), {}, tokenizer, "# A card\n")
    return model


def json_files(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def same_folders(ours: Path, theirs: Path) -> None:
    mine, wanted = families.tensors(ours), families.tensors(theirs)
    assert {n: (x.dtype, x.shape) for n, x in mine.items()} == {
        n: (x.dtype, x.shape) for n, x in wanted.items()
    }
    for name, tensor in mine.items():
        assert torch.equal(tensor, wanted[name]), name
    assert json_files(ours) == json_files(theirs)
    assert {x.name for x in ours.iterdir()} == {x.name for x in theirs.iterdir()} | {"README.md"}


@pytest.mark.floors
@pytest.mark.parametrize("family", families.FAMILIES)
def test_names_dtypes_tensors_and_files_are_those_of_save_pretrained(
    tmp_path: Path, family: str
) -> None:
    base = families.save(family, tmp_path / "base")
    model = export(base, tmp_path / "ours", torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "theirs")
    same_folders(tmp_path / "ours", tmp_path / "theirs")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_names_are_those_of_the_base_s_files(tmp_path: Path) -> None:
    """Google's Gemma 3 has older names than a new model that transformers saves."""
    base = families.save("gemma3", tmp_path / "base")
    older = {}
    for name, tensor in families.tensors(base).items():
        name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
        older[name.replace("lm_head", "language_model.lm_head")] = tensor
    save_file(older, base / "model.safetensors", {"format": "pt"})
    model = export(base, tmp_path / "ours", torch.bfloat16)
    assert families.tensors(tmp_path / "ours").keys() == older.keys()
    model.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "theirs")
    same_folders(tmp_path / "ours", tmp_path / "theirs")


CONFIG = (
    "from transformers import LlamaConfig\nclass Config(LlamaConfig):\n    model_type = 'own'\n"
)
MODEL = """from transformers import LlamaForCausalLM
from .own_config import Config
class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_a_models_own_code_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    base = families.save("llama", tmp_path / "base")
    own = {"AutoConfig": "own_config.Config", "AutoModelForCausalLM": "own_model.Model"}
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["Model"], "auto_map": own}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own_config.py").write_text(CONFIG)
    (base / "own_model.py").write_text(MODEL)
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    args = ModelArguments(model_name_or_path=str(base), trust_remote_code=True)
    made = ModelExport(BaseWeights(args, torch.float32), torch.float32)
    tokenizer, loaded = AutoTokenizer.from_pretrained(base), Loaded(model)
    names = made.gathered(loaded, ())
    made.write(tmp_path / "ours", loaded, names, {}, tokenizer, "# A card\n")
    model.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "theirs")
    same_folders(tmp_path / "ours", tmp_path / "theirs")
    assert (tmp_path / "ours" / "own_model.py").read_text() == MODEL
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    assert type(again).__name__ == "Model"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [2, 1 + 1e-5])
def test_a_head_that_differs_from_the_embedding_is_not_tied(
    tmp_path: Path, stored: torch.dtype, trained: torch.dtype, factor: float
) -> None:
    """Although the config ties them. from_pretrained does so too, in the dtype of the training."""
    base = families.save("tied", tmp_path / "base")
    tensors = {name: x.bfloat16().float() for name, x in families.tensors(base).items()}
    tensors["lm_head.weight"] = factor * tensors["model.embed_tokens.weight"]
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    model = export(base, tmp_path / "ours", trained)
    model.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "theirs")
    same_folders(tmp_path / "ours", tmp_path / "theirs")
    apart = factor == 2 or (stored == trained == torch.float32)
    assert ("lm_head.weight" in families.tensors(tmp_path / "ours")) == apart
    export(base, tmp_path / "other", trained, to=torch.float16)
    assert ("lm_head.weight" in families.tensors(tmp_path / "other")) == apart


@pytest.mark.parametrize("key", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_weight_has_either_name_or_both(tmp_path: Path, key: str) -> None:
    base = families.save("tied", tmp_path / "base")
    tensors = families.tensors(base)
    weight = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {key: weight}, base / "model.safetensors", {"format": "pt"})
    export(base, tmp_path / "one", torch.float32)
    both = {name: weight.clone() for name in ("lm_head.weight", "model.embed_tokens.weight")}
    save_file(tensors | both, base / "model.safetensors", {"format": "pt"})
    export(base, tmp_path / "both", torch.float32)
    for folder in (tmp_path / "one", tmp_path / "both"):
        ours = families.tensors(folder)
        assert ours.keys() == {*tensors, "model.embed_tokens.weight"}
        assert torch.equal(ours["model.embed_tokens.weight"], weight)


def test_what_the_files_lack_comes_from_the_engine_or_is_refused(tmp_path: Path) -> None:
    """A router's bias that the engine has in bf16, and the model keeps in float32."""
    base = families.save("ernie4_5_moe", tmp_path / "base")
    lacking = "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"  # in memory
    in_file = lacking.replace(".gate", "")
    tensors = families.tensors(base)
    assert tensors.pop(in_file).numel()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).bfloat16()
    made = ModelExport(
        BaseWeights(ModelArguments(model_name_or_path=str(base)), torch.bfloat16), torch.bfloat16
    )
    loaded, tokenizer = Loaded(model), AutoTokenizer.from_pretrained(base)
    made.write(tmp_path / "ours", loaded, made.gathered(loaded, ()), {}, tokenizer, "# A card\n")
    ours = families.tensors(tmp_path / "ours")
    assert ours[lacking].dtype == torch.float32  # no name in the files asks for another
    gate = "model.layers.1.mlp.gate.weight"
    assert torch.equal(ours[gate], tensors[gate])  # not as the engine has rounded it
    del loaded.parameters[lacking]
    with pytest.raises(UserError) as error:
        made.gathered(loaded, ())
    assert f"no checkpoint holds {lacking}" in one_sentence(error)


def test_other_parameters_than_the_configs_are_refused(tmp_path: Path) -> None:
    base = families.save("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.add_module("extra", nn.Linear(2, 2))
    args = ModelArguments(model_name_or_path=str(base))
    with pytest.raises(UserError) as error:
        ModelExport(BaseWeights(args, torch.float32), torch.float32).gathered(Loaded(model), ())
    assert "it was loaded with other parameters, such as extra.bias" in one_sentence(error)


def test_the_config_may_name_another_file(tmp_path: Path) -> None:
    base = families.save("llama", tmp_path / "base")
    (base / "model.safetensors").rename(base / "other.safetensors")
    config = json.loads((base / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (base / "config.json").write_text(json.dumps(config))
    export(base, tmp_path / "ours", torch.float32)
    assert families.tensors(tmp_path / "ours").keys() == families.tensors(base).keys()


def test_the_base_may_be_gone_when_the_model_is_written(tmp_path: Path) -> None:
    base = families.save("gemma3", tmp_path / "base")
    (base / "processor_config.json").write_text("{}")
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    args = ModelArguments(model_name_or_path=str(base))
    made = ModelExport(BaseWeights(args, torch.float32), torch.float32)
    loaded = Loaded(model)
    names = made.gathered(loaded, ())
    shutil.rmtree(base)
    made.write(tmp_path / "ours", loaded, names, {}, tokenizer, "# A card\n")
    model.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "processor_config.json").write_text("{}")
    same_folders(tmp_path / "ours", tmp_path / "theirs")


def test_processor_files_are_copied_or_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = families.save("gemma3", tmp_path / "base")
    export(base, tmp_path / "without", torch.float32)
    assert "has no processor files" in caplog.text
    caplog.clear()
    names = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
    for name in names:
        (base / name).write_text('{"processor_class": "Gemma3Processor"}')
    export(base, tmp_path / "with", torch.float32)
    assert not caplog.text
    for name in names:
        assert (tmp_path / "with" / name).read_bytes() == (base / name).read_bytes()


def test_a_large_model_is_in_the_same_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_model, "LARGEST_FILE", "12KB")
    base = families.save("mixtral", tmp_path / "base")
    model = export(base, tmp_path / "ours", torch.float32)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="12KB")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "theirs")
    assert len([*(tmp_path / "ours").glob("*.safetensors")]) > 3
    same_folders(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_the_files_may_have_another_dtype_and_keep_what_is_float32(
    tmp_path: Path, family: str
) -> None:
    base = families.save(family, tmp_path / "base")
    export(base, tmp_path / "ours", torch.float32, to=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "theirs")
    dtypes = {tensor.dtype for tensor in families.tensors(tmp_path / "ours").values()}
    assert dtypes == {torch.bfloat16, torch.float32}
    same_folders(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize(
    "config",
    [
        {"do_sample": False, "temperature": 0.9, "top_p": 0.6},  # as Llama-2-chat's
        {"max_length": 5, "max_new_tokens": 3, "do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static", "num_beams": 1, "early_stopping": True},
        {"eos_token_id": [1, 2, 3], "suppress_tokens": [4], "something_new": {"a": 1}},
        None,
    ],
)
def test_generation_configs_of_every_kind(tmp_path: Path, config: dict[str, Any] | None) -> None:
    base = families.save("llama", tmp_path / "base")
    file = base / "generation_config.json"
    file.unlink()
    if config:
        file.write_text(json.dumps(config))
    export(base, tmp_path / "ours", torch.float32)
    written = json.loads((tmp_path / "ours" / file.name).read_text())
    assert written.items() >= (config or {}).items()


def test_generation_settings_in_an_older_models_config(tmp_path: Path) -> None:
    base = families.save("llama", tmp_path / "base")
    (base / "generation_config.json").unlink()
    config = json.loads((base / "config.json").read_text())
    settings = {"do_sample": False, "temperature": 0.9, "num_beams": 1, "length_penalty": 2.0}
    (base / "config.json").write_text(json.dumps(config | settings))
    model = export(base, tmp_path / "ours", torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    written = json_files(tmp_path / "ours")
    assert written["generation_config.json"].items() >= settings.items()
    for name in ("generation_config.json", "config.json"):
        assert written[name] == json_files(tmp_path / "theirs")[name]


def test_a_damaged_or_missing_file_is_one_sentence(tmp_path: Path) -> None:
    base = families.save("llama", tmp_path / "base")
    args = ModelArguments(model_name_or_path=str(base))
    (base / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(UserError) as error:
        BaseWeights(args, torch.float32).opened()
    assert "model.safetensors is damaged" in one_sentence(error)
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        BaseWeights(args, torch.float32).opened()
    assert "it has none of model.safetensors" in one_sentence(error)
