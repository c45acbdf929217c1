"""Functions that ranks run in tests/e2e/test_first_step.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.layout import Layout
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards, as_matrix
from scalora_dist.methods.lora_pro import LoraPro
from scalora_dist.model_io.merged_weights import MergedWeights
from scalora_dist.model_io.parameters import EngineParameters
from scalora_dist.profiling.clock import Clock
from scalora_dist.training.trainer import Trainer
from tests.support import runs
from tests.support.batches import arrays

Batch = dict[str, np.ndarray]


class Found(NamedTuple):
    """The full tensors and figures of a run, the same on every rank.

    Attributes:
        added: {layer: {parameter that the method added: value}} at the start.
        weights: {parameter of the loaded model: merged value}, at the start and after each step.
        losses: loss of each step.
        batches: global batch of each step.
        samples: samples of the method's initialization.
        parameters: number of trained parameters.
    """

    added: dict[str, dict[str, np.ndarray]]
    weights: list[dict[str, np.ndarray]]
    losses: list[float]
    batches: list[Batch]
    samples: Batch
    parameters: int


def steps(world: World, options: dict[str, Any]) -> Found:
    """Train like ``Trainer.run``, and record the weights between the steps."""
    trainer = runs.make(world, options)
    micro_batches = trainer.start()
    trainer.engine.module.train()
    added = whole_added(trainer)
    weights, losses = [whole_weights(trainer)], []
    for step in range(trainer.feed.steps):
        record, _ = trainer.take_step(step, micro_batches)
        assert "skipped_step" not in record
        losses.append(record["loss"])
        weights.append(whole_weights(trainer))
    trainer.watchdog.close()
    count = trainer.options.method.start_samples or 1
    generator = np.random.default_rng(trainer.options.train.seed)
    chosen = generator.permutation(len(trainer.feed.data.train))[:count]
    return Found(
        added,
        weights,
        losses,
        [
            together(trainer, trainer.feed.batches.indices(step))
            for step in range(trainer.feed.steps)
        ],
        together(trainer, chosen.tolist()),
        trainer.runner.parameters,
    )


def start(world: World, options: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """``Found.added`` of a run, and its number of training examples."""
    trainer = runs.make(world, options)
    trainer.start()
    trainer.close()
    return whole_added(trainer), len(trainer.feed.data.train)


def together(trainer: Trainer, indices: list[int]) -> Batch:
    return arrays(trainer.feed.collate([trainer.feed.data.train[i] for i in indices]))


def whole_weights(trainer: Trainer) -> dict[str, np.ndarray]:
    merged = MergedWeights(EngineParameters(trainer.engine, trainer.runner.low_halves))
    found = {}
    for name in merged.parameters.loaded:
        whole = merged.full_tensor(name, on_rank=trainer.world.rank)
        assert whole is not None
        found[name] = whole.numpy().copy()
    return found


@torch.no_grad()
def whole_added(trainer: Trainer) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for parameter in trainer.engine.added_shards():
        (whole,) = Layout.of([parameter.shard]).gather([parameter.shard], range(1))
        layer = next(n for n in trainer.engine.adapted if parameter.name.startswith(f"{n}."))
        key = parameter.name.removeprefix(f"{layer}.")
        found.setdefault(layer, {})[key] = whole.view(parameter.shape).numpy().copy()
    return found


@torch.no_grad()
def lora_pro(
    world: World, layers: list[tuple[Tensor, Tensor, Tensor, Tensor]], scaling: float
) -> list[tuple[Tensor, Tensor]]:
    """LoRA-Pro's full dA and dB from the full (A, B, ∇A, ∇B), sharded into equal flat ranges."""

    class Cut:
        """The part of an engine's interface that LoraPro uses."""

        def __init__(self) -> None:
            self.world, self.gradient_dtype = world, torch.float32

        def layer_shards(self, *, gradients: bool) -> list[LayerShards]:
            return shards

    def cut(whole: Tensor) -> FlatShard:
        share = -(-whole.numel() // world.size)
        start = min(world.rank * share, whole.numel())
        local = whole.flatten()[start : start + share].clone()
        return FlatShard(local, start, as_matrix(whole.shape), dist.group.WORLD)

    shards = []
    for i, given in enumerate(layers):
        A, B, grad_A, grad_B = (cut(whole) for whole in given)
        shards.append(LayerShards(str(i), scaling, A, A, B, grad_A, grad_B, (), ()))
    report = LoraPro(Cut())(shards, Clock())  # type: ignore[arg-type]
    assert report.applied
    found = []
    for layer in shards:
        pair = [layer.grad_A, layer.grad_B]
        dA, dB = Layout.of(pair).gather(pair, range(2))
        found.append((dA, dB))
    total = sum(float(part.double().square().sum()) for pair in found for part in pair)
    assert abs(report.grad_norm / total**0.5 - 1) < 1e-4
    return found
