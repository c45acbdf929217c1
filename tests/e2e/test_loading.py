"""How a model gets into the ranks: in parts where it is cut up, the same everywhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import (
    AutoConfig,
    BloomConfig,
    Gemma3Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
    dynamic_module_utils,
)

from scalora_dist.config.model import ModelArguments
from scalora_dist.distributed.world import World
from scalora_dist.modeling.load import (
    FLASH,
    has_flash,
    load_model,
    pick_attention,
    read_base_model,
)
from tests.support import runs, tiny_models, tiny_runs
from tests.support.ranks import Ranks

GetRanks = Callable[[int], Ranks]
HEAVY = pytest.mark.heavy

# Small layers, 11 MiB in all, of which the largest matrix is a 40th.
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4}


def bytes_while_loading(world: World, case: dict[str, Any]) -> tuple[int, int]:
    """(the most bytes of tensors alive at once while a trainer is made, those of the model)"""
    with MemTracker() as tracker:
        made = runs.make(world, case)
    peak = tracker.get_tracker_snapshot("peak")[world.device]["Total"]
    return peak, sum(4 * parameter.shape.numel() for parameter in made.engine.base_shards())


@pytest.mark.parametrize(("engine", "size"), tiny_runs.CUT_UP)
def test_no_rank_but_the_first_ever_holds_a_whole_model(
    ranks: GetRanks, tmp_path: Path, engine: str, size: int
) -> None:
    """Its share and a few matrices. (What rank 0 reads are pages of the files, mapped.)"""
    task = tiny_models.save_task(tmp_path / "task", **SIZES)
    case = tiny_runs.options(task, tmp_path / "run", engine, per_device_train_batch_size=1)
    for peak, whole in ranks(size).run(bytes_while_loading, case)[1:]:
        assert whole / size < peak < whole * (1 / size + 0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_read_straight_to_a_device_are_the_same(odd: Path, dtype: torch.dtype) -> None:
    args = ModelArguments(model_name_or_path=str(odd))
    device = torch.device("cpu")
    base = read_base_model(args, dtype, device)
    plain = load_model(args, base, dtype, weights=True)
    placed = load_model(args, base, dtype, weights=True, device=device)
    assert plain.state_dict().keys() == placed.state_dict().keys()
    for name, tensor in placed.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, plain.state_dict()[name])
    assert type(placed.forward) is type(plain.forward)  # no hooks of accelerate's around it


# --- attention -----------------------------------------------------------------------------------

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "installed", "device", "dtype", "supported", "chosen"),
    [
        (None, True, CUDA, torch.bfloat16, True, FLASH),
        (None, True, CUDA, torch.float16, True, FLASH),
        (None, True, CUDA, torch.float32, True, None),
        (None, True, CUDA, torch.bfloat16, False, None),
        (None, True, CPU, torch.bfloat16, True, None),
        (None, False, CUDA, torch.bfloat16, True, None),
        ("eager", True, CUDA, torch.bfloat16, True, "eager"),
        ("sdpa", True, CUDA, torch.bfloat16, True, "sdpa"),
        (FLASH, False, CPU, torch.float32, False, FLASH),
    ],
)
def test_flash_attention_is_taken_where_it_can_be(
    asked: str | None,
    installed: bool,
    device: torch.device,
    dtype: torch.dtype,
    supported: bool,
    chosen: str | None,
) -> None:
    """And nothing that was named is overruled: transformers says what is wrong with it."""
    given: dict[str, Any] = {"installed": installed, "device": device, "dtype": dtype}
    assert pick_attention(asked, **given, supported=lambda: supported) == chosen


@pytest.mark.parametrize(
    ("config", "has"),
    [
        (LlamaConfig(**tiny_models.ODD_SIZES), True),
        (BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2), False),
        (Gemma3Config(), True),  # with a part that sees
        (GptOssConfig(), False),  # it would take a kernel of the hub
    ],
)
def test_a_model_is_asked_what_it_can_do(
    monkeypatch: pytest.MonkeyPatch, config: PreTrainedConfig, has: bool
) -> None:
    """Its class says so: no model is built, and the config is left as it was."""

    def build(*_: Any) -> None:
        raise AssertionError("a model is built")

    before = config.to_dict()
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "__init__", build)
        assert has_flash(config, ModelArguments()) is has
    assert config.to_dict() == before and config._attn_implementation is None


def test_one_part_of_a_model_without_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SiglipVisionModel, "_supports_flash_attn", False)
    assert not has_flash(Gemma3Config(), ModelArguments())


OWN_CODE = """from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own-without-flash"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    _supports_flash_attn = False
"""


def test_a_models_own_code_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before transformers knows its class."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", tmp_path / "modules")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "own.py").write_text(OWN_CODE)
    config = LlamaConfig(**tiny_models.ODD_SIZES).to_dict() | {"model_type": "own-without-flash"}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    args = ModelArguments(model_name_or_path=str(tmp_path / "own"), trust_remote_code=True)
    read = AutoConfig.from_pretrained(args.model_name_or_path, **args.source)
    assert not has_flash(read, args)


def attention_and_run(world: World, case: dict[str, Any]) -> str:
    made = runs.make(world, case)
    made.run()
    return made.model.config._attn_implementation


def test_implementations_of_attention_train_alike(
    ranks: GetRanks, odd: Path, tmp_path: Path
) -> None:
    losses = {}
    for asked, chosen in ((None, "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")):
        folder = tmp_path / str(asked)
        others = {"attn_implementation": asked, "max_steps": 3, "lora_dropout": 0.0}
        others |= {"per_device_train_batch_size": 12, "eval_size": 0, "learning_rate": 1e-2}
        case = tiny_runs.options(odd, folder, "local", **others)
        assert ranks(1).run(attention_and_run, case) == [chosen]
        losses[asked] = runs.losses(folder)
    assert losses[None] == losses["sdpa"]
    assert losses["eager"] == pytest.approx(losses["sdpa"], rel=1e-5)
    assert losses["sdpa"][-1] < losses["sdpa"][0] - 0.1
