"""How a model gets into the ranks: in parts where it is cut up, the same everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import BloomConfig, LlamaConfig

from scalora_dist.config.model import ModelArguments
from scalora_dist.distributed.world import World
from scalora_dist.modeling import load as models
from scalora_dist.modeling.load import FLASH, load_model, pick_attention, read_base_model
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
    ("config", "attention", "fits"),
    [
        (LlamaConfig(**tiny_models.ODD_SIZES), "sdpa", True),
        (BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2), "eager", True),
        (BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2), "sdpa", False),
        (BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2), FLASH, False),
    ],
)
def test_a_model_is_asked_what_it_can_do(config: Any, attention: str, fits: bool) -> None:
    """By transformers' own check; the config is left as it was."""
    before = config.to_dict()
    assert models._builds_with(attention, config, torch.bfloat16, ModelArguments()) is fits
    assert config.to_dict() == before and config._attn_implementation is None


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
