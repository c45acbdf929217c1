"""Two independent linear layers on fixed data: small enough to write everything out densely.

The functions here run on real ranks (``ranks.Ranks``) and answer with whole float64 arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from reference import State
from scalora_dist.adapters.init import lora_init
from scalora_dist.adapters.layers import LowRankLinear
from scalora_dist.engines.base import LayerShards
from scalora_dist.engines.deepspeed import DeepSpeedEngine
from scalora_dist.merge import join_halves
from scalora_dist.rescale import Rescaler
from scalora_dist.shards import Layout
from scalora_dist.world import World

SHAPES = {"first": (31, 24), "second": (13, 11)}
EXAMPLES = 12  # per step: a multiple of 1, 2, 3 and 4 ranks
SCALING, ETA_LIPSCHITZ, BOUNDS = 2.0, 0.5, (0.05, 5.0)
LEARNING_RATE = 1e-3


class Toy(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, (m, n) in SHAPES.items():
            linear = nn.Linear(n, m, bias=False, dtype=dtype)
            linear.weight.data = torch.randn(m, n, generator=generator).div(n**0.5).to(dtype)
            setattr(self, name, linear.requires_grad_(False))

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: getattr(self, name)(x[name]) for name in x}


def data(step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and targets of one global batch, {layer: (EXAMPLES, features)}."""
    generator = torch.Generator().manual_seed(100 + step)
    x = {k: torch.randn(EXAMPLES, n, generator=generator) for k, (_, n) in SHAPES.items()}
    y = {k: torch.randn(EXAMPLES, m, generator=generator) for k, (m, _) in SHAPES.items()}
    return x, y


def ds_config(world: World, stage: int, dtype: str, offload: bool, accumulation: int) -> dict:
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": EXAMPLES // world.size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


class Run:
    """A toy on an engine, one step at a time, everything visible as whole arrays."""

    def __init__(
        self,
        world: World,
        *,
        stage: int,
        rank: int,
        dtype: str = "fp32",
        offload: bool = False,
        accumulation: int = 1,
        rule: str = "paper",
        persist: bool = False,
        initial_scale_power: int = 8,
    ) -> None:
        self.world, self.accumulation = world, accumulation
        config = ds_config(world, stage, dtype, offload, accumulation)
        config["fp16"]["initial_scale_power"] = initial_scale_power
        if persist:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 10**6
        # DeepSpeed wants CPUs with fast fp16 for fp16; for a test the slow ones do.
        get_accelerator().is_fp16_supported = lambda: True
        self.engine = DeepSpeedEngine(world, config)
        model = Toy(self.engine.dtype)
        layers = {
            name: LowRankLinear.adapt(
                getattr(model, name),
                *lora_init(name, m, n, rank, seed=0, dtype=self.engine.dtype),
                scaling=SCALING,
                dropout=0.0,
            )
            for name, (m, n) in SHAPES.items()
        }
        self.engine.attach(
            model,
            layers,
            lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0),
        )
        self.rescaler = Rescaler(
            self.engine.layers(gradients=False),
            world,
            rule=rule,
            eta_lipschitz=ETA_LIPSCHITZ,
            bounds=BOUNDS,
            merge_rounding="split",
        )
        solve = self.rescaler.solve

        def remember(*args: Any) -> Any:
            self.scales = solve(*args)
            return self.scales

        self.rescaler.solve = remember

    def backward(
        self, step: int, poison: float = 1.0, reached: Iterable[str] = tuple(SHAPES)
    ) -> None:
        x, y = data(step)
        micro = EXAMPLES // self.world.size // self.accumulation
        for j in range(self.accumulation):
            start = (j * self.world.size + self.world.rank) * micro
            take = slice(start, start + micro)
            batch = {k: x[k][take].to(self.engine.dtype) for k in reached}
            out = self.engine.module(batch)
            loss = sum((out[k].float() - y[k][take]).square().sum() for k in reached) / 2
            last = j == self.accumulation - 1
            self.engine.backward(poison * loss / EXAMPLES, last=last)

    def whole(self, layers: list[LayerShards]) -> dict[str, State]:
        """Every layer's state, gathered."""
        states = {}
        for layer in layers:
            W, low = layer.W, self.rescaler.low.get(layer.name)
            fields = {
                "W": W if low is None else W.like(join_halves(W.local, low)),
                "A": layer.A,
                "B": layer.B,
                "grad_A": layer.grad_A,
                "grad_B": layer.grad_B,
            }
            for key, factor in (("A", layer.A), ("B", layer.B)):
                moments = getattr(layer, f"moments_{key}")
                zero = torch.zeros_like(factor.local)
                moments = moments or (factor.like(zero), factor.like(zero))
                fields |= {
                    f"{name}_{key}": value for name, value in zip("mv", moments, strict=True)
                }
            states[layer.name] = State(**{k: whole(v) for k, v in fields.items()})
        return states

    def output(self) -> dict[str, np.ndarray]:
        """The module's outputs on one batch, float64."""
        x, _ = data(0)
        with torch.no_grad():
            out = self.engine.module({k: v.to(self.engine.dtype) for k, v in x.items()})
        return {k: v.double().numpy() for k, v in out.items()}


def whole(shard: Any) -> np.ndarray:
    return (
        Layout.of([shard])
        .gather([shard.like(shard.local.detach().float())], range(1))[0]
        .double()
        .numpy()
    )


def steps(world: World, count: int, **case: Any) -> list[dict[str, Any]]:
    """``count`` steps with a rescale each; what was seen before and after each transform."""
    run = Run(world, **case)
    seen = []
    for step in range(count):
        run.backward(step)
        loss_scale = run.engine.loss_scale
        record: dict[str, Any] = {"loss_scale": loss_scale}

        def transform(layers: list[LayerShards], record: dict[str, Any] = record) -> bool:
            record["before"] = run.whole(layers)
            report = run.rescaler(layers)
            record["after"] = run.whole(layers)
            record["report"] = report
            if report.applied:
                record["scales"] = [run.scales.alpha.numpy(), run.scales.beta.numpy()]
            return report.applied

        record["applied"] = run.engine.step(transform)
        record["stepped"] = run.whole(run.engine.layers(gradients=False))
        record["output"] = run.output()
        seen.append(record)
    return seen


def skipped_step(world: World, **case: Any) -> dict[str, Any]:
    """Three steps, the second poisoned on the last rank only; states around it."""
    run = Run(world, **case)
    results: dict[str, Any] = {}
    for step in range(3):
        run.backward(step, float("nan") if step == 1 and world.rank == world.size - 1 else 1.0)
        key = f"step{step}"
        results[f"{key}_state"] = run.whole(run.engine.layers(gradients=False))
        results[f"{key}_applied"] = run.engine.step(lambda layers: run.rescaler(layers).applied)
        results[f"{key}_after"] = run.whole(run.engine.layers(gradients=False))
        results[f"{key}_output"] = run.output()
    return results


def unreached_layer(world: World, *, skip_first: bool, **case: Any) -> list[dict[str, Any]]:
    """Four steps; the forwards of the last two do not reach the second layer.

    With ``skip_first`` the step before them is poisoned, and so discarded.
    """
    run = Run(world, **case)
    seen = []
    for step in range(4):
        poison = float("nan") if skip_first and step == 1 else 1.0
        run.backward(step, poison, tuple(SHAPES) if step < 2 else ("first",))
        record: dict[str, Any] = {}

        def transform(layers: list[LayerShards], record: dict[str, Any] = record) -> bool:
            record["before"] = run.whole(layers)
            return run.rescaler(layers).applied

        record["applied"] = run.engine.step(transform)
        seen.append(record)
    return seen
