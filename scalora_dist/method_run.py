"""One method at work on one engine: what is made once, and called around every step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from scalora_dist.adapters.carry import CarryLinear
from scalora_dist.carry import Carry
from scalora_dist.config import MethodArguments, Options
from scalora_dist.engines.base import Engine, LayerShards
from scalora_dist.errors import UserError
from scalora_dist.merger import IntoWeights, Merger, MergeTarget
from scalora_dist.methods import Method
from scalora_dist.monitor import UpdateMonitor
from scalora_dist.profiling.clock import Clock, now
from scalora_dist.profiling.memory import peak_memory_bytes
from scalora_dist.shards import global_norm
from scalora_dist.starts.start import Start

logger = logging.getLogger(__name__)


class MethodRun:
    """
    Attributes:
        parameters: how many numbers are trained, over all ranks.
        merger: of a method that merges while it trains.
        low: {parameter: int16 remainders of its 16-bit values}.
        edits_weights: whether W changes although it is not trained.
        transform, restarts, monitor: None where the method or the options have none.
        clock: is told of each part of a step that begins.
    """

    clock = Clock()

    def __init__(self, method: Method, engine: Engine, options: Options) -> None:
        """
        Args:
            engine: sharded, its weights as they were loaded.

        Raises:
            UserError: options that this method cannot follow.
        """
        self.method, self.engine, self.options = method, engine, options
        self.parameters = sum(math.prod(p.master.shape) for p in engine.trained(gradients=False))
        args, seed = options.method, options.train.seed
        self.merger = None
        if method.merges:
            layers = engine.layers(gradients=False)
            self.merger = Merger(layers, engine.world, merge_target(engine, layers, args))
        self.low: Mapping[str, Tensor] = self.merger.into.low if self.merger else {}
        self.edits_weights = method.edits_weights and args.merge_target != "carry"
        self.transform = self.restarts = self.monitor = None
        if method.transform:
            self.transform = method.transform(engine, self.merger, args)
        if method.restarts:
            assert self.merger is not None
            self.restarts = method.restarts(self.merger, args, seed)
        if options.train.rank_monitor_steps:
            self.monitor = self._make_monitor()

    def _make_monitor(self) -> UpdateMonitor:
        train = self.options.train
        layers = self.engine.layers(gradients=False)
        if not layers:
            raise UserError(
                "--rank_monitor_steps follows factors A and B of ours, and "
                f"--method {self.options.method.method} has none: leave it out"
            )
        count = train.rank_monitor_layers
        monitor = UpdateMonitor(layers, count, self.engine.world, seed=train.seed % 2**32)
        if self.merger:
            self.merger.monitor = monitor
        return monitor

    def fill_in(self, samples: Callable[[], Callable[[], Iterable[Tensor]]]) -> None:
        """The method's start, if it has one: then ``samples`` makes the ``losses`` of ``Start``."""
        if self.method.start is None:
            return
        started = time.perf_counter()
        train, args = self.options.train, self.options.method
        self.method.start(Start(self.engine, args, samples(), train.learning_rate, train.seed))
        (peak,) = self.engine.world.max(peak_memory_bytes(self.engine.world.device))
        logger.info(
            "the start of %s took %.1f s; peak memory of a rank so far %.2f GiB",
            *(args.method, time.perf_counter() - started, peak / 2**30),
        )

    def before_step(
        self, steps_taken: int, finite: bool, record: dict[str, Any]
    ) -> Callable[[list[LayerShards]], bool]:
        """What ``Engine.step`` is to do between backward and the optimizer's step.

        Args:
            finite: whether the loss is; if not the step is discarded.
            record: for metrics.jsonl; gradient norms and what the transform says are filled in.
        """
        engine, loss_scale = self.engine, self.engine.loss_scale

        def measure(_: list[LayerShards]) -> bool:
            self.clock.begin("norm")
            gradients = [parameter.gradient for parameter in engine.trained()]
            record["grad_norm"] = global_norm(gradients, engine.world.device) / loss_scale
            self.clock.begin("optimizer")
            return finite and math.isfinite(record["grad_norm"])

        transform = self.transform
        if transform is None or not transform.due(steps_taken):
            return measure

        def change(layers: list[LayerShards]) -> bool:
            started = now(engine.world.device)
            report = transform(layers, self.clock) if finite else transform.refuse(layers)
            self.clock.begin("optimizer")
            if report.applied and math.isnan(report.grad_norm):  # it does not know
                applied = measure(layers)
            else:
                applied = report.applied
                record["grad_norm"] = report.grad_norm / loss_scale
                record["grad_norm_before"] = report.grad_norm_before / loss_scale
            seconds = now(engine.world.device) - started
            record[transform.name] = {**report.record, "seconds": seconds}
            return applied

        return change

    def after_step(self, steps_taken: int, record: dict[str, Any]) -> None:
        """A restart and the monitor's reading, where they are due; they go into ``record``."""
        if self.restarts and self.restarts.due(steps_taken):
            device = self.engine.world.device
            started = now(device)
            self.restarts(self.engine, steps_taken, self.clock)
            self.clock.begin("rest")
            record[self.restarts.name] = {"seconds": now(device) - started}
        if self.merger and (report := self.merger.into.report()):
            record["carry"] = report
        if self.monitor and record["step"] % self.options.train.rank_monitor_steps == 0:
            record["rank_monitor"] = self.monitor.read(self.engine.layers(gradients=False))

    def finish(self) -> dict[str, Any]:
        """After the last step: a carry becomes as small as an adapter is; what that lost."""
        if not self.merger:
            return {}
        with self.engine.writing():
            self.merger.into.finish(self.engine.layers(gradients=False))
        return self.merger.into.report()


def merge_target(
    engine: Engine, layers: Sequence[LayerShards], args: MethodArguments
) -> MergeTarget:
    """What the merges of a method go into, by its settled options."""
    if args.merge_target != "carry":
        return IntoWeights(layers, args.merge_rounding)
    modules = {n: x for n, x in engine.adapted.items() if isinstance(x, CarryLinear)}
    assert args.carry_rank is not None
    return Carry(layers, modules, engine.world, rank=args.carry_rank, limit=args.carry_limit)
