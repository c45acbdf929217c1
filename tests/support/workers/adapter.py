"""Runs that write adapters or start from them, and loads their adapters with other libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from scalora_dist.distributed.world import World
from scalora_dist.model_io.merged_weights import MergedWeights
from scalora_dist.model_io.parameters import EngineParameters
from scalora_dist.modeling.load import load_model
from scalora_dist.training import build_model
from tests.support import runs, tiny_models, tiny_runs

IDS = [[3 + (7 * i + i * i) % 250 for i in range(20)], [3 + 11 * i % 250 for i in range(20)]]

RANK = tiny_runs.TASK["rank"]
# A carry that is compressed several times in a few steps.
CARRY: dict[str, Any] = {"load_in_4bit": True, "carry_rank": 6, "carry_room": 4}


def save_even_task(folder: Path) -> Path:
    """Save a tiny model and texts, of sizes that bitsandbytes' own layer supports on a CPU."""
    return tiny_models.save_task(
        folder,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.1,
    )


def options(task: Path, folder: Path, engine: str = "local", **others: Any) -> dict[str, Any]:
    folder.parent.mkdir(exist_ok=True)
    given: dict[str, Any] = {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "save_steps": 0,
        "per_device_train_batch_size": 6,
    }
    return tiny_runs.options(task, folder, engine, **given | others)


def size(engine: str) -> int:
    return 1 if engine == "local" else 2


def differ(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.abs(a - b).max())


def train(world: World, case: dict[str, Any]) -> NDArray[np.float32]:
    """Train. Returns the trained model's logits, computed by the engine's own module."""
    made = runs.make(world, case)
    made.run()
    module = made.engine.module
    module.eval()
    with torch.no_grad():
        ids = torch.tensor(IDS, device=world.device)
        return module(input_ids=ids, use_cache=False).logits.float().cpu().numpy()


def train_and_merge(world: World, case: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Train. Returns {layer: merged W (m, n), with low halves}, on rank 0 only."""
    made = runs.make(world, case)
    made.run()
    merged = MergedWeights(EngineParameters(made.engine, made.runner.low_halves))
    wholes = {name: merged.full_tensor(f"{name}.weight", on_rank=0) for name in made.engine.adapted}
    return {name: whole.numpy() for name, whole in wholes.items() if whole is not None}


def train_and_gather(
    world: World, case: dict[str, Any]
) -> tuple[dict[str, NDArray[np.float32]], list[str]]:
    """Train. Returns {parameter that the method added: its exact value}, and the warnings."""
    with tiny_runs.warnings_of() as heard:
        made = runs.make(world, case)
        made.run()
    merged = MergedWeights(EngineParameters(made.engine, made.runner.low_halves))
    names = [added.name for added in made.engine.added_shards()]
    with torch.no_grad():
        return {name: merged.precise(name).float().cpu().numpy() for name in names}, heard


def refusal_of_another_base(world: World, case: dict[str, Any]) -> tuple[str, int, list[str]]:
    """The refusal of a run whose loaded model differs from the base's files."""

    def load(*args: Any, **kwargs: Any) -> Any:
        model = load_model(*args, **kwargs)
        model.get_parameter("model.layers.1.mlp.up_proj.weight").data.mul_(2)
        return model

    with patch.object(build_model, "load_model", load):
        return tiny_runs.refusal(world, case)


def logits(model: torch.nn.Module) -> NDArray[np.float32]:
    """Logits in training mode (there is no dropout): else bitsandbytes uses bf16 on a CPU."""
    with torch.no_grad():
        return model.train()(input_ids=torch.tensor(IDS)).logits.float().numpy()


def base(task: Path, *, fourbit: bool = False) -> Any:
    """The base model, loaded in fp32 by transformers alone."""
    given: dict[str, Any] = {"dtype": torch.float32}
    if fourbit:
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return AutoModelForCausalLM.from_pretrained(task, **given)


def by_peft(task: Path, run: Path, *, fourbit: bool = False) -> NDArray[np.float32]:
    """The logits of the base model with a run's adapter, loaded by PEFT."""
    return logits(PeftModel.from_pretrained(base(task, fourbit=fourbit), str(run / "adapter")))


def by_transformers(task: Path, run: Path) -> NDArray[np.float32]:
    """The logits of the base model with a run's adapter, loaded by transformers."""
    model = base(task)
    model.load_adapter(str(run / "adapter"))
    return logits(model)


def config(run: Path) -> dict[str, Any]:
    return json.loads((run / "adapter" / "adapter_config.json").read_text())


def products(run: Path) -> dict[str, Tensor]:
    """The products of a run's adapter, {layer: lora_B lora_A (m, n) float64}."""
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    layers = {key.removeprefix("base_model.model.").rsplit(".", 2)[0] for key in tensors}
    found = {}
    for layer in layers:
        a, b = (tensors[f"base_model.model.{layer}.lora_{x}.weight"].double() for x in "BA")
        found[layer] = a @ b
    return found


def held_out(run: Path) -> list[float]:
    return [line["eval_loss"] for line in tiny_runs.lines(run) if "eval_loss" in line]
