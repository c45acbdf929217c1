"""Runs one method on one engine: set up once, then called before and after every step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalora_dist.config.method import MethodArguments
from scalora_dist.config.options import Options
from scalora_dist.core import host
from scalora_dist.core.layout import global_norm
from scalora_dist.engines.base import Engine
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.errors import UserError
from scalora_dist.layers.carry_linear import CarryLinear
from scalora_dist.methods.carry import Carry
from scalora_dist.methods.init.initialization import Initialization
from scalora_dist.methods.init.samples import SamplePass
from scalora_dist.methods.merger import IntoWeights, Merger, MergeTarget
from scalora_dist.methods.method import Method
from scalora_dist.methods.rank_monitor import RankMonitor
from scalora_dist.profiling.clock import Clock
from scalora_dist.profiling.memory import peak_memory_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """What a method did before an optimizer step.

    Attributes:
        applied: whether the engine must take the step. If False, no parameter was changed.
        metrics: the method's part of the step's line in metrics.jsonl.
    """

    applied: bool
    metrics: dict[str, Any]


class MethodRunner:
    """Runs the transform, restart and rank monitor of one method.

    Attributes:
        method: the method's entry in the registry.
        engine: the sharded model with its optimizer.
        options: all options of the run.
        parameters: number of trained parameters of the full model.
        merger: merges A and B if the method merges during training, else None.
        low_halves: {parameter: low halves of its 16-bit values}, int16, sharded like the parameter.
        edits_weights: whether W changes although it is not trained.
        transform: runs before the optimizer's step, or None.
        restart: runs between two steps, or None.
        monitor: estimates the rank of the accumulated update, or None.
        clock: its ``begin`` is called as each part of a step begins.
    """

    clock = Clock()

    def __init__(self, method: Method, engine: Engine, options: Options) -> None:
        """
        Args:
            engine: with a sharded model whose weights are still as they were loaded.

        Raises:
            UserError: options that this method does not support.
        """
        self.method = method
        self.engine = engine
        self.options = options
        trained = engine.trained_shards(gradients=False)
        self.parameters = sum(math.prod(shard.master.shape) for shard in trained)
        args = options.method
        self.merger = None
        if method.merges:
            layers = engine.layer_shards(gradients=False)
            self.merger = Merger(layers, engine.world, merge_target(engine, layers, args))
        self.low_halves: Mapping[str, Tensor] = self.merger.target.low_halves if self.merger else {}
        self.edits_weights = method.edits_weights and args.merge_target != "carry"
        self.transform = method.transform and method.transform(engine, self.merger, options)
        self.restart = None
        if method.restart:
            assert self.merger is not None
            self.restart = method.restart(self.merger, args, options.train.seed)
        self.monitor = self._make_monitor() if options.train.rank_monitor_steps else None

    def _make_monitor(self) -> RankMonitor:
        train = self.options.train
        layers = self.engine.layer_shards(gradients=False)
        if not layers:
            raise UserError(
                "--rank_monitor_steps needs the factors A and B of our own layers, which "
                f"--method {self.options.method.name} does not have: leave it out"
            )
        count = train.rank_monitor_layers
        monitor = RankMonitor(layers, count, self.engine.world, seed=train.seed % 2**32)
        if self.merger:
            self.merger.monitor = monitor
        return monitor

    def initialize(self, samples: Callable[[], SamplePass], *, examples: float) -> None:
        """Run the method's initialization, if it has one.

        Args:
            samples: makes the passes over the samples. Called only if there is an initialization.
            examples: number of examples that the run trains on, with repeats.

        Raises:
            UserError: a gradient is not finite, or its GPU has no memory for the initialization.
        """
        if self.method.initialize is None:
            return
        started = time.perf_counter()
        train, args = self.options.train, self.options.method
        losses = samples()
        initialization = Initialization(
            self.engine,
            args,
            losses,
            losses.longest,
            learning_rate=train.learning_rate,
            warmup_ratio=train.warmup_ratio,
            examples=examples,
            seed=train.seed,
        )
        try:
            self.method.initialize(initialization)
        except torch.OutOfMemoryError as error:
            if not args.reads("start_memory"):
                raise
            raise UserError(
                f"a GPU has not enough memory to initialize {args.name}: set --start_memory to "
                "fewer MiB than the run has logged for the GPU, or --gradient_checkpointing if it "
                "has logged none"
            ) from error
        (peak,) = self.engine.world.max(peak_memory_bytes(self.engine.world.device))
        logger.info(
            "the initialization of %s took %.1f s; peak memory of a rank so far %.2f GiB",
            args.name,
            time.perf_counter() - started,
            peak / 2**30,
        )

    def layers_due(self, steps_taken: int) -> list[LayerShards]:
        """This rank's shards, with reduced gradients, if a transform is due; else []. Local.

        They may be found while the device still computes the backward.

        Args:
            steps_taken: number of steps before the next one that were not skipped.
        """
        due = self.transform is not None and self.transform.due(steps_taken)
        return self.engine.layer_shards() if due else []

    def before_step(self, layers: Sequence[LayerShards], *, finite: bool) -> StepReport:
        """Run the method's transform if one is due, and get the gradient norm. A collective.

        Args:
            layers: as from ``layers_due``. Edited in place.
            finite: whether the loss is finite. If not, nothing is changed.
        """
        transform = self.transform
        if transform is None or not layers:
            norm = self._gradient_norm()
            return StepReport(finite and math.isfinite(norm), {"grad_norm": norm})
        loss_scale = self.engine.loss_scale
        started = time.perf_counter()
        report = transform(layers, self.clock) if finite else transform.refuse(layers)
        self.clock.begin("optimizer")
        metrics: dict[str, Any] = {
            "grad_norm": report.grad_norm / loss_scale,
            "grad_norm_before": report.grad_norm_before / loss_scale,
        }
        # Of the host. It has waited for the grams, but not for the last writes.
        seconds = time.perf_counter() - started
        metrics[transform.name] = {**report.details, "seconds": seconds}
        return StepReport(report.applied and math.isfinite(report.grad_norm), metrics)

    def _gradient_norm(self) -> float:
        """The norm over all trained parameters and ranks, without the loss scale."""
        self.clock.begin("norm")
        gradients = self.engine.gradients()
        norm = host.on_host(float, global_norm(gradients, self.engine.world.device))
        self.clock.begin("optimizer")
        return norm / self.engine.loss_scale

    def after_step(self, step: int, steps_taken: int) -> dict[str, Any]:
        """Run the restart and read the monitor where they are due. A collective.

        Args:
            step: number of the step just taken, from 1; skipped steps count.
            steps_taken: number of steps so far that were not skipped.

        Returns:
            their part of the step's line in metrics.jsonl.
        """
        metrics: dict[str, Any] = {}
        if self.restart and self.restart.due(steps_taken):
            started = time.perf_counter()
            self.restart(self.engine, steps_taken, self.clock)
            self.clock.begin("rest")
            metrics[self.restart.name] = {"seconds": time.perf_counter() - started}
        if self.merger and (report := self.merger.target.report()):
            metrics["carry"] = report
        if self.monitor and step % self.options.train.rank_monitor_steps == 0:
            metrics["rank_monitor"] = self.monitor.read(self.engine.layer_shards(gradients=False))
        return metrics

    def finish(self) -> dict[str, Any]:
        """Called after the last step: compress a carry to the size of an adapter.

        A collective. Returns the report on what the compression lost, {} if there was none.
        """
        if not self.merger:
            return {}
        with self.engine.writing():
            self.merger.target.finish(self.engine.layer_shards(gradients=False))
        return self.merger.target.report()


def merge_target(
    engine: Engine, layers: Sequence[LayerShards], args: MethodArguments
) -> MergeTarget:
    """Make the target of a method's merges. ``args`` have resolved merge options."""
    if args.merge_target != "carry":
        return IntoWeights(layers, args.merge_rounding)
    modules = {n: x for n, x in engine.adapted.items() if isinstance(x, CarryLinear)}
    assert args.carry_rank is not None
    return Carry(layers, modules, engine.world, rank=args.carry_rank, limit=args.carry_limit)
