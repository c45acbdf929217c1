"""Profiles the time and memory of training steps, for ``--profile``."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from scalora_dist.config.options import Options
from scalora_dist.core import host
from scalora_dist.data.micro_batch import MicroBatch
from scalora_dist.errors import UserError
from scalora_dist.methods.method import AddContext
from scalora_dist.methods.runner import MethodRunner
from scalora_dist.modeling.load import outline
from scalora_dist.profiling.clock import Clock, Stopwatch
from scalora_dist.profiling.communication import communication
from scalora_dist.profiling.flops import Flops, count_flops
from scalora_dist.profiling.gpus import find_gpu
from scalora_dist.profiling.memory import restart_peak
from scalora_dist.profiling.table import render_profile
from scalora_dist.training.run_log import write_json
from scalora_dist.training.state_bytes import gradient_bytes, state_bytes

logger = logging.getLogger(__name__)
Numbers: TypeAlias = Mapping[str, Mapping[str, float]]
OverRanks: TypeAlias = dict[str, dict[str, float]]


class Profile(Clock):
    """A no-op profile. The training loop calls it; ``StepProfile`` records the measurements."""

    def start(self, step: int) -> None:
        """Called when step ``step``, counted from 1, begins."""

    def forward(self, batch: MicroBatch) -> None:
        """Called when the forward of a micro-batch begins."""
        self.begin("forward")

    def finish(self, tokens: int) -> dict[str, Any]:
        """Called when the step is over. Returns additions to its line of metrics.jsonl.

        Args:
            tokens: number of tokens in all ranks' micro-batches, without padding.
        """
        return {}

    def close(self) -> None:
        """Called when the run is over: write and show the profile."""


def make_profile(options: Options, runner: MethodRunner, steps: int) -> Profile:
    """Make the profile that the options ask for. Called on every rank.

    Args:
        steps: number of steps of the whole run.

    Raises:
        UserError: the run ends before the end of ``--profile_window``.
    """
    if not options.profile.profile:
        return Profile()
    window = options.profile.profile_window
    if window and window[1] > steps:
        raise UserError(
            f"--profile_window {window[0]} {window[1]}: the run ends after step {steps}; "
            "name steps before that"
        )
    return StepProfile(options, runner, steps)


class StepProfile(Profile):
    """Measures every step, and traces the steps of a window.

    It synchronizes with the device at the end of each part, so that work is counted in the part
    that started it. The time of measuring itself, between parts, is not counted. torch.profiler
    records the collectives and makes each part a little longer.
    """

    def __init__(self, options: Options, runner: MethodRunner, steps: int) -> None:
        self.runner = runner
        self.engine = runner.engine
        self.world = runner.engine.world
        self.steps = steps
        self.device = self.world.device
        self.window = options.profile.profile_window
        assert options.train.output_dir is not None
        self.folder = Path(options.train.output_dir) / "profile"
        self.flops = flops_of(options, runner)
        self.peak_tflops = peak_of(options, self.device)
        self.seen: list[dict[str, Any]] = []  # one profile per step of this process
        self.gradients: int | None = None  # bytes, measured once
        self.recording = False  # whether CUDA allocations are recorded
        # Kineto logs the begin and end of every profile, unless this is set before the first one.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")

    def start(self, step: int) -> None:
        if self.window is None:
            self.window = [min(step + 2, self.steps), min(step + 3, self.steps)]
        if not self.seen and step > self.window[1]:
            logger.warning("--profile_window is over: the run goes on from step %d", step)
        self.step, self.traced = step, self.window[0] <= step <= self.window[1]
        self.work = 0.0
        self.peaks: dict[str, int] = {}
        if self.device.type == "cuda" and self.traced and not self.recording:
            torch.cuda.memory._record_memory_history()
            self.recording = True
        self.profiler = profile(activities=self._activities())
        self.profiler.start()
        restart_peak(self.device)
        self.watch = Stopwatch(self.device)
        self.started = time.time_ns()
        self.ranges = [record_function(f"step {step}")]
        self.ranges[0].__enter__()
        self.begin("rest")

    def _activities(self) -> list[ProfilerActivity]:
        """On a GPU without a trace, record kernels only: they include the collectives.

        Recording CPU operators costs more time.
        """
        gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        return gpu if gpu and not self.traced else [ProfilerActivity.CPU, *gpu]

    def begin(self, part: str) -> None:
        self._end()
        if part == "optimizer" and self.gradients is None:
            self.gradients = gradient_bytes(self.engine)  # they are reduced by now
        self.watch.begin(part)
        self.ranges.append(record_function(part))
        self.ranges[-1].__enter__()

    def _end(self) -> None:
        part = self.watch.part
        self.watch.end()
        if part is None:
            return
        self.ranges.pop().__exit__(None, None, None)
        peak = restart_peak(self.device)
        if peak is not None:
            self.peaks[part] = max(peak, self.peaks.get(part, 0))

    def forward(self, batch: MicroBatch) -> None:
        if self.flops:
            examples, length = batch.input_ids.shape
            self.work += self.flops.step(examples, length, len(batch.targets))
        super().forward(batch)

    def finish(self, tokens: int) -> dict[str, Any]:
        self._end()
        self.ranges.pop().__exit__(None, None, None)
        ended = time.time_ns()
        self.profiler.stop()
        assert self.profiler.profiler and self.profiler.profiler.kineto_results
        events = self.profiler.profiler.kineto_results.events()
        collectives, alone = communication(events, self.started, ended, self.device)
        if self.traced:
            self._write_trace()
        del self.profiler, events
        kept = state_bytes(self.engine, self.runner.low_halves) | {"gradients": self.gradients or 0}
        mean, most = self._over_ranks(
            {
                "parts": self.watch.seconds,
                "whole": {"seconds": sum(self.watch.seconds.values()), "flops": self.work},
                "communication": {"seconds": collectives, "exposed": alone},
                "memory": kept,
                "peak": self.peaks,
            }
        )
        seconds = most["whole"]["seconds"]
        found: dict[str, Any] = {
            "step": seconds,
            "parts": mean["parts"],
            "slowest": most["parts"],
            "communication": mean["communication"] | {"slowest": most["communication"]["seconds"]},
            "tokens_per_second": tokens / seconds,
        }
        if self.flops:
            found["tflops"] = mean["whole"]["flops"] / seconds / 1e12
            if self.peak_tflops:
                found["mfu"] = found["tflops"] / self.peak_tflops
        found |= {"memory": most["memory"], "peak": most["peak"]}
        self.seen.append(found)
        return {"profile": found}

    def _over_ranks(self, numbers: Numbers) -> tuple[OverRanks, OverRanks]:
        """The mean and the maximum of each number over all ranks: one all-gather.

        Args:
            numbers: {group: {name: number}}, with the same names in the same order on every rank.
        """
        row = [value for group in numbers.values() for value in group.values()]
        rows = self.world.gather_rows(torch.tensor([row], dtype=torch.float64))
        found = []
        both = host.on_host(lambda rows: (rows.mean(0).tolist(), rows.amax(0).tolist()), rows)
        for values in both:
            value = iter(values)
            found.append({key: {n: next(value) for n in group} for key, group in numbers.items()})
        return found[0], found[1]

    def _write_trace(self) -> None:
        """Write this step's Chrome trace. At the end of the window, also CUDA's allocations."""
        assert self.window is not None
        rank = self.world.rank
        trace = self.folder / f"trace-step{self.step}-rank{rank}.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.profiler.export_chrome_trace(str(trace))
            if self.recording and self.step == self.window[1]:
                torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-rank{rank}.pickle"))
        except OSError as error:  # a full disk does not end the run
            logger.warning("%s: %s", trace, error.strerror)
        if self.recording and self.step == self.window[1]:
            torch.cuda.memory._record_memory_history(enabled=None)

    def close(self) -> None:
        if not (self.world.is_main and self.seen):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        timed = self.seen[1:] or self.seen  # the first step also sets up kernels and buffers
        report = {
            "steps": len(timed),
            "ranks": self.world.size,
            "peak_tflops": self.peak_tflops,
            "median": medians(timed),
            "share": shares(timed, "parts"),
            "communication_share": shares(timed, "communication"),
            "traces": sorted(str(path) for path in self.folder.glob("trace-*")),
            "snapshots": sorted(str(path) for path in self.folder.glob("memory-*")),
        }
        write_json(self.folder / "profile.json", report)
        logger.info("\n%s\n", render_profile(report))


def flops_of(options: Options, runner: MethodRunner) -> Flops | None:
    """Counts the FLOPs of this run's micro-batches. None for a model that cannot be counted.

    The columns of a carry are not counted, because their number changes.
    """
    with torch.random.fork_rng(devices=[]):
        model = outline(options.model, runner.engine.dtype)
        context = AddContext(options.method, options.train.seed, runner.engine.dtype)
        runner.method.add(model, context)
    try:
        return count_flops(model.to("meta"))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        logger.warning("no FLOP/s: the model's operations cannot be counted (%s)", reason)
        return None


def peak_of(options: Options, device: torch.device) -> float | None:
    """The device's peak in 1e12 FLOP/s: from the options, else the GPU's 16-bit peak if known."""
    if options.profile.peak_tflops or device.type != "cuda":
        return options.profile.peak_tflops
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.tflops if gpu and options.train.dtype != torch.float32 else None


def medians(seen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of each number over the steps that have it, in the same nested mappings."""
    names = dict.fromkeys(name for one in seen for name in one)
    found: dict[str, Any] = {}
    for name in names:
        values = [one[name] for one in seen if name in one]
        found[name] = medians(values) if isinstance(values[0], Mapping) else median(values)
    return found


def shares(seen: Sequence[Mapping[str, Any]], group: str) -> dict[str, float]:
    """Each of a group's seconds, summed over steps, as a share of the seconds of all parts."""
    whole = sum(sum(one["parts"].values()) for one in seen)
    names = dict.fromkeys(name for one in seen for name in one[group])
    return {name: sum(one[group].get(name, 0.0) for one in seen) / whole for name in names}
