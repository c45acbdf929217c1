"""A toy model for tests of engines: two independent linear layers on fixed data.

It is small enough for a dense reference. The functions here run on real ranks (``ranks.Ranks``) and
return full float64 arrays.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.grams import Grams
from scalora_dist.core.layout import Layout
from scalora_dist.core.scale_solver import Rule, Scales
from scalora_dist.core.split_precision import join_halves
from scalora_dist.distributed.world import World
from scalora_dist.engines.base import Engine
from scalora_dist.engines.deepspeed import DeepSpeedEngine
from scalora_dist.engines.ds_config import sum_gradients_in_fp32
from scalora_dist.engines.fsdp import FSDPEngine
from scalora_dist.engines.fsdp_config import FSDPConfig
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.engines.local import LocalEngine
from scalora_dist.layers.adapted_linear import LowRankLinear
from scalora_dist.layers.lora_init import lora_init
from scalora_dist.methods.adamw_direction import adamw_direction
from scalora_dist.methods.merger import IntoWeights, Merger
from scalora_dist.methods.scalora import Rescaler
from scalora_dist.methods.transform import TransformReport
from scalora_dist.profiling.clock import Clock
from tests.support.ranks import most_ranks
from tests.support.reference import State

SHAPES = {"first": (31, 24), "second": (13, 11)}
EXAMPLES = 12  # examples per step: a multiple of 1, 2, 3 and 4 ranks
SCALING, ETA_LIPSCHITZ, BOUNDS = 2.0, 0.5, (0.05, 5.0)
LEARNING_RATE = 1e-3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ZERO = ("zero0", "zero1", "zero2", "zero3")
ENGINES = (*ZERO, "fsdp", "hybrid", "local")
KEPT = ("W", "A", "B", "m_A", "v_A", "m_B", "v_B")  # fields of a State that last between steps
HYBRID_MESH = [2, 2]  # ranks 0 and 1 hold the same values as ranks 2 and 3


def ranks_of(engine: str) -> int:
    """The default number of ranks for tests of an engine."""
    return {"local": 1, "hybrid": 4}.get(engine, most_ranks(2))


class Block(nn.Sequential):
    """A decoder block for FSDP, with a group of its own."""


class Toy(nn.Module):
    """Two layers, for FSDP's two kinds of groups: the first is in a block, the second is not."""

    _no_split_modules = ("Block",)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.linear = {}
        for name, (m, n) in SHAPES.items():
            linear = nn.Linear(n, m, bias=False, dtype=dtype)
            linear.weight.data = torch.randn(m, n, generator=generator).div(n**0.5).to(dtype)
            self.linear[name] = linear.requires_grad_(False)
        self.first, self.second = Block(self.linear["first"]), self.linear["second"]

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: getattr(self, name)(x[name]) for name in x}


def data(step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and targets of one step's global batch, each {layer: (EXAMPLES, features)}."""
    generator = torch.Generator().manual_seed(100 + step)
    x = {k: torch.randn(EXAMPLES, n, generator=generator) for k, (_, n) in SHAPES.items()}
    y = {k: torch.randn(EXAMPLES, m, generator=generator) for k, (m, _) in SHAPES.items()}
    return x, y


def make_engine(
    world: World,
    name: str,
    *,
    dtype: str = "fp32",
    offload: bool = False,
    accumulation: int = 1,
    persist: bool = False,
    initial_scale_power: int = 8,
    reshard: bool | int = True,
) -> Engine:
    """Make an engine by name.

    Args:
        name: zero0 to zero3, local (one rank), fsdp, or hybrid (four ranks).
        dtype: fp32, bf16 or fp16.
        offload: whether to offload to the CPU.
        accumulation: micro-batches per step.
        persist: whether ZeRO-3 keeps small parameters gathered.
        initial_scale_power: binary logarithm of fp16's first loss scale.
        reshard: whether FSDP frees a block's gathered weights after its forward; a number: it
            reshards them to groups of that size.
    """
    if name in ZERO:
        config = ds_config(world, int(name[-1]), dtype, offload, accumulation)
        config["fp16"]["initial_scale_power"] = initial_scale_power
        if persist:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 10**6
        # DeepSpeed requires a CPU with fast fp16. For a test, slow fp16 is enough.
        get_accelerator().is_fp16_supported = lambda: True
        return DeepSpeedEngine(world, config)
    if name == "local":
        assert world.size == 1
        return LocalEngine(world, dtype=DTYPES[dtype], max_grad_norm=1.0)
    fsdp = FSDPConfig(
        mesh={"fsdp": [world.size], "hybrid": HYBRID_MESH}[name],
        reshard_after_forward=reshard,
        param_dtype=DTYPES[dtype],
        reduce_dtype=torch.float32,
        cpu_offload=offload,
    )
    return FSDPEngine(world, fsdp, dtype=DTYPES[dtype], max_grad_norm=1.0)


def ds_config(
    world: World, stage: int, dtype: str, offload: bool, accumulation: int
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": EXAMPLES // world.size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    sum_gradients_in_fp32(config, "the toy's config")
    return config


class Run:
    """The toy model on an engine, run step by step, with its full tensors as arrays."""

    def __init__(
        self,
        world: World,
        *,
        engine: str,
        rank: int = 3,
        accumulation: int = 1,
        rule: str = "paper",
        threshold: float = 0.0,
        **settings: Any,
    ) -> None:
        """``threshold`` as for ``Rescaler``; ``settings`` as for ``make_engine``."""
        self.world, self.accumulation = world, accumulation
        self.engine = make_engine(world, engine, accumulation=accumulation, **settings)
        model = Toy(self.engine.dtype)
        layers = {
            name: LowRankLinear.adapt(
                model.linear[name],
                *lora_init(name, m, n, rank, seed=0, dtype=self.engine.dtype),
                scaling=SCALING,
                dropout=0.0,
            )
            for name, (m, n) in SHAPES.items()
        }
        if self.engine.loads_on_rank_0 and not world.is_main:
            model.to("meta")
        self.engine.attach(
            model,
            layers,
            lambda named: torch.optim.AdamW(named.values(), lr=LEARNING_RATE, weight_decay=0),
        )
        shards = self.engine.layer_shards(gradients=False)
        self.merger = Merger(shards, world, IntoWeights(shards, "split"))
        self.rescaler = Rescaler(
            self.merger,
            rule=rule,
            eta_lipschitz=ETA_LIPSCHITZ,
            bounds=BOUNDS,
            threshold=threshold,
            fp16=self.engine.gradient_dtype == torch.float16,
            direction=partial(adamw_direction, self.engine, max_grad_norm=1.0)
            if rule == "adamw"
            else None,
        )
        solve = self.rescaler.solve

        def remember(layers: Sequence[LayerShards], grams: Grams) -> tuple[Scales, Tensor] | None:
            found = solve(layers, grams)
            if found:
                self.scales = found[0]
            return found

        self.rescaler.solve = remember  # type: ignore[method-assign]

    def backward(
        self, step: int, poison: float = 1.0, reached: Iterable[str] = tuple(SHAPES)
    ) -> None:
        x, y = data(step)
        micro = EXAMPLES // self.world.size // self.accumulation
        for j in range(self.accumulation):
            start = (j * self.world.size + self.world.rank) * micro
            take = slice(start, start + micro)
            batch = {k: x[k][take].to(self.world.device, self.engine.dtype) for k in reached}
            out = self.engine.module(batch)
            wanted = {k: y[k][take].to(self.world.device) for k in reached}
            loss = sum((out[k].float() - wanted[k]).square().sum() for k in reached) / 2
            last = j == self.accumulation - 1
            self.engine.backward(poison * loss / EXAMPLES, last=last)

    def step(self, step: int) -> bool:
        self.backward(step)
        return self.finish_step(self.rescale().applied)

    def rescale(self) -> TransformReport:
        """Run ScaLoRA's transform, on the gradients of the last backward."""
        return self.rescaler(self.engine.layer_shards(), Clock())

    def finish_step(self, applied: bool) -> bool:
        """Step or discard the step, like the trainer after the transform. Returns ``applied``."""
        if applied:
            self.engine.step()
        else:
            self.engine.discard_step()
        return applied

    def look(self) -> tuple[dict[str, State], dict[str, np.ndarray]]:
        """The state of all layers between two steps, and the module's outputs."""
        return self.whole(self.engine.layer_shards(gradients=False)), self.output()

    def whole(self, layers: list[LayerShards]) -> dict[str, State]:
        """Every layer's gathered state, {layer: state}. Collective."""
        states = {}
        for layer in layers:
            W, low = layer.W, self.merger.target.low_halves.get(f"{layer.name}.weight")
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
            wholes = {k: whole(v, self.world.device) for k, v in fields.items()}
            states[layer.name] = State(**wholes)
        return states

    def output(self) -> dict[str, np.ndarray]:
        """The module's outputs on one batch, {layer: (EXAMPLES, m) float64}."""
        x, _ = data(0)
        with torch.no_grad():
            device, dtype = self.world.device, self.engine.dtype
            out = self.engine.module({k: v.to(device, dtype) for k, v in x.items()})
        return {k: v.double().cpu().numpy() for k, v in out.items()}


def whole(shard: Any, device: torch.device) -> np.ndarray:
    """The full matrix, float64. Collective, on the ranks' ``device``."""
    single = shard.like(shard.local.detach().float())
    return Layout.of([shard], device).gather([single], range(1))[0].double().cpu().numpy()


def steps(world: World, count: int, *, evaluate: bool = False, **case: Any) -> list[dict[str, Any]]:
    """Run ``count`` steps with a rescale each. Returns the states around each transform.

    With ``evaluate``, the model is also called without gradients between each backward and the
    transform.
    """
    run = Run(world, **case)
    seen = []
    for step in range(count):
        run.backward(step)
        if evaluate:
            run.output()
        loss_scale = run.engine.loss_scale
        layers = run.engine.layer_shards()
        record: dict[str, Any] = {"loss_scale": loss_scale, "before": run.whole(layers)}
        report = run.rescaler(layers, Clock())
        record["after"] = run.whole(layers)
        record["report"] = report
        if report.applied:
            record["scales"] = [run.scales.alpha.numpy(), run.scales.beta.numpy()]
            record["rules"] = [Rule(code) for code in run.scales.rule.tolist()]
        record["applied"] = run.finish_step(report.applied)
        record["stepped"] = run.whole(run.engine.layer_shards(gradients=False))
        record["output"] = run.output()
        seen.append(record)
    return seen


def skipped_step(world: World, **case: Any) -> dict[str, Any]:
    """Three steps, the second with NaN gradients on the last rank only; the states around each."""
    run = Run(world, **case)
    results: dict[str, Any] = {}
    for step in range(3):
        run.backward(step, float("nan") if step == 1 and world.rank == world.size - 1 else 1.0)
        key = f"step{step}"
        results[f"{key}_state"] = run.whole(run.engine.layer_shards(gradients=False))
        results[f"{key}_applied"] = run.finish_step(run.rescale().applied)
        results[f"{key}_after"] = run.whole(run.engine.layer_shards(gradients=False))
        results[f"{key}_output"] = run.output()
    return results


def unreached_layer(
    world: World, *, skip_first: bool, reached: str = "first", **case: Any
) -> list[dict[str, Any]]:
    """Four steps; the forwards of the last two reach only one layer.

    With ``skip_first``, the step before them has NaN gradients, and so is discarded.
    """
    run = Run(world, **case)
    seen = []
    for step in range(4):
        poison = float("nan") if skip_first and step == 1 else 1.0
        run.backward(step, poison, tuple(SHAPES) if step < 2 else (reached,))
        record: dict[str, Any] = {"before": run.whole(run.engine.layer_shards())}
        record["applied"] = run.finish_step(run.rescale().applied)
        seen.append(record)
    return seen


def bits_after_steps(world: World, count: int, **case: Any) -> list[dict[str, bytes]]:
    """After each step: the bytes of all tensors on this rank, and of the last α and β."""
    run = Run(world, **case)
    seen = []
    for step in range(count):
        run.step(step)
        held = {"alpha": run.scales.alpha, "beta": run.scales.beta}
        for layer in run.engine.layer_shards(gradients=False):
            held |= {f"{layer.name}.{key}": getattr(layer, key).local for key in "WAB"}
            if (low := run.merger.target.low_halves.get(f"{layer.name}.weight")) is not None:
                held[f"{layer.name}.low"] = low
        seen.append(
            {k: v.cpu().contiguous().view(torch.uint8).numpy().tobytes() for k, v in held.items()}
        )
    return seen


def frozen_after_evaluation(world: World, **case: Any) -> dict[str, dict[str, np.ndarray]]:
    """Frozen weights before an evaluation from layer shards, and after it from base shards.

    Returns {"W": {layer: merged weight before}, "frozen": {parameter: full matrix after}}.
    """
    run = Run(world, **case)
    run.step(0)
    states = run.whole(run.engine.layer_shards(gradients=False))
    run.output()
    frozen = {
        name: (shape, whole(shard, world.device)) for name, shape, shard in run.engine.base_shards()
    }
    assert all(array.shape == tuple(shape) for shape, array in frozen.values())
    return {
        "W": {name: state.W for name, state in states.items()},
        "frozen": {name: array for name, (_, array) in frozen.items()},
    }


def restored(world: World, **case: Any) -> dict[str, list[tuple[dict[str, State], dict[str, Any]]]]:
    """Step 3 of a first run, and of a second run into which the state after step 2 was copied.

    Under "first" and "second": (state, output) after step 2 and after step 3.
    """
    first = Run(world, **case)
    for step in range(3):
        first.step(step)
    state = copy.deepcopy(first.engine.state())
    saved = [shard.local.clone() for shard in checkpointed(first)]
    low = {name: part.clone() for name, part in first.merger.target.low_halves.items()}
    seen = {"first": [first.look()]}
    first.step(3)
    seen["first"].append(first.look())

    second = Run(world, **case)
    with second.engine.restoring(state):
        for shard, part in zip(checkpointed(second), saved, strict=True):
            shard.local.copy_(part)
        for name, part in low.items():
            second.merger.target.low_halves[name].copy_(part)
    seen["second"] = [second.look()]
    assert second.engine.state() == state
    second.step(3)
    seen["second"].append(second.look())
    return seen


def checkpointed(run: Run) -> list[FlatShard]:
    """All shards of the layers that belong into a checkpoint."""
    layers = run.engine.layer_shards(gradients=False)
    return [s for x in layers for s in (x.W, x.A, x.B, *x.moments_A, *x.moments_B)]
