"""Runs on 4-bit bases, and measurements of them on ranks, for tests/e2e/test_fourbit*.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from scalora_dist.config.method import MethodArguments, MethodName
from scalora_dist.distributed.world import World
from scalora_dist.layers.adapted_linear import LowRankLinear
from scalora_dist.layers.fourbit_linear import FourBitLinear
from scalora_dist.methods.carry import Carry
from scalora_dist.methods.registry import METHODS
from scalora_dist.methods.transform import TransformReport
from scalora_dist.model_io.merged_weights import MergedWeights
from scalora_dist.model_io.parameters import EngineParameters
from scalora_dist.modeling.load import load_model
from scalora_dist.training import build_model
from tests.support import runs, tiny_models, tiny_runs

STEPS, SAVED = 8, 4
RATES = {"lora-sb": 1e-3, "lora-alpha": 1e-3}
# Carries of this size are compressed before the checkpoint and after it.
CARRY = {"carry_rank": 8, "carry_room": 4}


def options(
    task: Path, folder: Path, engine: str, method: MethodName = "scalora", **others: Any
) -> dict[str, Any]:
    read = ("rank", "lora_alpha", "lora_dropout")
    given: dict[str, Any] = {
        "method": method,
        "load_in_4bit": True,
        "learning_rate": RATES.get(method, 1e-2),
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "save_steps": SAVED,
        "per_device_train_batch_size": 3,
        "lora_dropout": 0.0,  # other ranks draw other dropout
    }
    if method == "relora":
        given |= {"relora_interval": 2, "relora_warmup_steps": 1}
    if METHODS[method].merges:
        given |= CARRY
    unread = {name: None for name in read if not MethodArguments(method=method).reads(name)}
    return tiny_runs.options(task, folder, engine, **(given | others | unread))


def save_even_model(folder: Path, **others: Any) -> Path:
    """Save a tiny Llama whose sizes are multiples of 64, with a byte tokenizer and texts."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.02}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    return tiny_models.save_task(folder, **sizes | others)


def changes(world: World, case: dict[str, Any]) -> list[dict[str, dict[str, float]]]:
    """Train. Returns, for each rescale and layer, how much the layer's function changed; on rank 0.

    "weight": relative change of the effective weight, W with carry and adapter. "allowed": the part
    of it that the carry reports as lost. "output": relative change of the layer's output, in one
    process only.
    """
    trainer = runs.make(world, case)
    transform, merger = trainer.runner.transform, trainer.runner.merger
    assert transform is not None and merger is not None
    carry = merger.target
    assert isinstance(carry, Carry)
    seen: list[dict[str, dict[str, float]]] = []

    def look() -> dict[str, tuple[Tensor, Tensor, float]]:
        merged = MergedWeights(EngineParameters(trainer.engine, trainer.runner.low_halves))
        found = {}
        for name, layer in trainer.engine.adapted.items():
            assert isinstance(layer, LowRankLinear)
            weight = merged.full_tensor(f"{name}.weight", on_rank=0)
            output = torch.zeros(1)
            if world.size == 1:
                x = torch.randn(16, layer.in_features, generator=torch.Generator().manual_seed(0))
                output = layer(x)
            if weight is not None:
                found[name] = weight.double(), output, layer.scaling * carry.lost[name]
        return found

    class Watched(type(transform)):  # type: ignore[misc]
        def __call__(self, layers: Any, clock: Any) -> TransformReport:
            with torch.no_grad():
                before = look()
                report = super().__call__(layers, clock)
                after = look()
            step = {}
            for name, (weight, output, lost) in before.items():
                weight2, output2, lost2 = after[name]
                size = float(weight.norm())
                step[name] = {
                    "weight": float((weight2 - weight).norm()) / size,
                    "allowed": (lost2 - lost) / size,
                    "output": float((output2 - output).norm() / output.norm().clamp_min(1e-9)),
                }
            seen.append(step)
            return report

    transform.__class__ = Watched
    trainer.run()
    return seen


def held(world: World, case: dict[str, Any]) -> dict[str, int]:
    """Sizes of a model before training.

    Elements of the full model: "quantized" and "other" parameters. Bytes on this rank: all other
    keys. Under ZeRO-3, "persistent" is the bytes of small parameters that stay gathered.
    """
    trainer = runs.make(world, case)
    engine = trainer.engine
    layers = dict(engine.model.named_modules())
    found = dict.fromkeys(
        ("quantized", "other", "codes", "sizes", "dense", "carry", "adapters", "persistent"), 0
    )
    for name, shape, shard in engine.base_shards():
        layer = layers.get(name.rpartition(".")[0])
        if isinstance(layer, FourBitLinear) and name.endswith(".weight"):
            found["quantized"] += layer.out_features * layer.in_features
            found["codes"] += shard.local.nbytes
            found["sizes"] += layer.sizes.nbytes
        else:
            found["other"] += shape.numel()
            found["dense"] += shard.local.nbytes
    for name, _, shard in engine.added_shards():
        kind = "carry" if name.endswith((".C", ".D")) else "adapters"
        found[kind] += shard.local.nbytes
    found["carry"] += sum(low.nbytes for low in trainer.runner.low_halves.values())
    zero = getattr(getattr(engine, "engine", None), "optimizer", None)
    for parameter in getattr(zero, "persistent_parameters", []):
        found["persistent"] += parameter.data.nbytes
    trainer.close()
    return found


def attributes(world: World, case: dict[str, Any]) -> set[str]:
    """Names of instance attributes of 4-bit layers that plain linear layers do not have."""
    trainer = runs.make(world, case)
    trainer.close()
    plain = vars(torch.nn.Linear(1, 1)).keys()
    return {name for x in trainer.engine.adapted.values() for name in vars(x).keys() - plain}


def on_meta(world: World, case: dict[str, Any]) -> list[str]:
    """Names of parameters that were on "meta" on this rank when the engine got the model."""
    names: list[str] = []

    def note(*args: Any, **kwargs: Any) -> Any:
        model = load_model(*args, **kwargs)
        names.extend(name for name, p in model.named_parameters() if p.is_meta)
        return model

    with patch.object(build_model, "load_model", note):
        made = runs.make(world, case)
    made.close()
    return names
