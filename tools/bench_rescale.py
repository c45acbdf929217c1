"""Measures the cost of a rescale: times steps, the rescale's parts and the naive merge in one run.

    deepspeed --num_gpus 2 tools/bench_rescale.py --ds_config zero3 --config demo \\
        --model_name_or_path MODEL [--max_length 64 --rounds 5 --json out.json]

Takes the trainer's options and starts like the trainer, on random tokens. Writes no results.
`--rounds` rounds use one engine and one model. A round is a LoRA step, a ScaLoRA step, our merge
and, under ZeRO-3, the naive merge. So other load on the machine affects all of them equally.

All ranks start a duration together, with idle devices. It ends when the slowest rank's device is
idle again. A step is the trainer's step: forward, backward, sums over ranks, the gradients' norm or
the rescale, and the optimizer. The ranks also synchronize before the rescale, because waiting for a
slower rank's backward is not its cost. Between its rescales, ScaLoRA-I takes LoRA steps. So
interval 10 is not run but computed, in each round from nine LoRA steps and one ScaLoRA step. The
merges are timed with increments of zero, which do not change W. The tool checks once that both
merges give the same W.
"""

from __future__ import annotations

import math
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist

from scalora_dist.config.option import JsonFile, tool_option
from scalora_dist.config.options import Options
from scalora_dist.config.parser import parse_options
from scalora_dist.config.words import Parser
from scalora_dist.core.layout import global_norm
from scalora_dist.core.scale_solver import Scales
from scalora_dist.data.collate import batch_of
from scalora_dist.engines.build import join
from scalora_dist.errors import UserError, exit_with_one_sentence
from scalora_dist.layers.adapted_linear import LowRankLinear
from scalora_dist.methods.scalora import Rescaler
from scalora_dist.profiling.clock import Clock, Stopwatch
from scalora_dist.profiling.traffic import Traffic
from scalora_dist.profiling.versions import installed_versions
from scalora_dist.training.run_log import write_json
from scalora_dist.training.trainer import Trainer

DERIVED = ("scalora_step_interval_10", "rescale")  # variants that are not run on their own


@dataclass(frozen=True)
class BenchArguments(JsonFile):
    _argument_group_name = "bench"

    rounds: int = tool_option(5, "Rounds that are timed, after one that is not.", at_least=1)


@torch.no_grad()
def naive_merge(modules: Mapping[str, LowRankLinear], scales: Scales) -> None:
    """``W += s·A diag(1 − α∘β) Bᵀ``, in the way of DeepSpeed's documentation for ZeRO-3.

    Layer by layer, every rank gathers the full W, rank 0 edits it, and it is broadcast and sharded
    again. Factors that ZeRO keeps gathered are not gathered again, which would only make this merge
    slower.
    """
    # The only use of deepspeed outside engines/. Users write such code; we compare our merge to it.
    import deepspeed

    for module, alpha, beta in zip(modules.values(), scales.alpha, scales.beta, strict=True):
        A, B, W = module.A, module.B, module.weight
        cut_up = [W, *(factor for factor in (A, B) if not getattr(factor, "ds_persist", False))]
        with deepspeed.zero.GatheredParameters(cut_up, modifier_rank=0):
            if dist.get_rank() == 0:
                weight = module.scaling * (1 - alpha * beta)
                W.addmm_((A * weight.to(A)).to(W), B.T.to(W))


class Bench:
    """A trainer's model on its engine, with the operations that are timed.

    Attributes:
        modules: {name: adapted layer}.
        shards: this rank's shards of the adapted layers.
        merger: merges into W.
        rescaler: ScaLoRA's transform.
        factors: shape (2, layers, r) of α and β together.
        seconds: this rank's latest rescale in seconds, in total and by part.
        batch: random token ids, all but the first of each example targets, on the device.
    """

    def __init__(self, trainer: Trainer) -> None:
        """
        Raises:
            UserError: the method is not ScaLoRA, or merges into a carry.
        """
        options, world = trainer.options, trainer.world
        runner, method, train = trainer.runner, options.method, options.train
        if not isinstance(runner.transform, Rescaler) or not runner.edits_weights:
            raise UserError("this tool times ScaLoRA's merges into W: set --method scalora")
        self.world = world
        self.engine = trainer.engine
        self.scheduler = trainer.scheduler
        self.loss = trainer.loss
        self.modules = cast(Mapping[str, LowRankLinear], trainer.engine.adapted)
        self.shards = self.engine.layer_shards(gradients=False)
        self.rescaler = runner.transform
        self.merger = self.rescaler.merger
        self.factors = (2, len(self.modules), method.rank)
        self.seconds: dict[str, float] = {}
        generator = torch.Generator().manual_seed(train.seed + world.rank)
        shape = (train.per_device_train_batch_size, options.data.max_length)
        vocabulary = trainer.model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, shape, generator=generator)
        self.batch = batch_of(ids, ids).to(world.device)

    def scales(self, low: float, high: float) -> Scales:
        """Random α and β, each (layers, r) float64 in [low, high), the same on all ranks."""
        both = torch.empty(self.factors, dtype=torch.float64)
        alpha, beta = both.uniform_(low, high, generator=torch.Generator().manual_seed(0))
        return Scales(alpha, beta, torch.ones(len(alpha), dtype=torch.int64))

    def clock(self) -> float:
        """The time in seconds, when this rank's device is idle."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return time.perf_counter()

    def meet(self) -> float:
        """Wait until all ranks are here with idle devices, then return the time in seconds."""
        self.clock()
        dist.barrier()
        return self.clock()

    def time(self, work: Callable[[], None]) -> float:
        """Seconds of ``work`` on the slowest rank. Collective."""
        started = self.meet()
        work()
        return self.world.max(self.clock() - started)[0]

    def lora_step(self) -> None:
        self._backward()
        gradients = self.engine.gradients()
        self._step(applied=math.isfinite(global_norm(gradients, self.world.device)))

    def scalora_step(self, counted: AbstractContextManager[Any] | None = None) -> None:
        """Take a step with a rescale, and keep the rescale's times in ``seconds``.

        Args:
            counted: context in which the rescale runs, e.g. to count its traffic.
        """
        self._backward()
        layers = self.engine.layer_shards()
        started, parts = self.meet(), Stopwatch(self.world.device)
        with counted or nullcontext():
            report = self.rescaler(layers, parts)
        parts.end()
        self.seconds = {"rescale": self.clock() - started, **parts.seconds}
        self._step(applied=report.applied)

    def _backward(self) -> None:
        loss = self.loss(self.engine.module, self.batch).loss
        self.engine.backward(loss / (self.world.size * len(self.batch.targets)), last=True)
        self.world.sum(loss.detach())

    def _step(self, *, applied: bool) -> None:
        if not applied:
            raise RuntimeError("gradients are not finite: a skipped step's time means nothing")
        self.engine.step()
        self.scheduler.step()

    @torch.no_grad()
    def local_merge(self, scales: Scales) -> None:
        """Run only our merge: gather the factors, and each rank adds to its own ranges of W."""
        self.rescaler.merge(self.shards, scales, Clock())

    @torch.no_grad()
    def compare_merges(self) -> dict[str, float]:
        """Merge the same increments in both ways into the same W, and restore W.

        Returns:
            The largest difference of the two results and the largest increment, over all layers and
            ranks. Both are relative to the layer's largest weight on that rank.
        """
        tensors = [
            *(layer.W.local for layer in self.shards),
            *self.merger.target.low_halves.values(),
        ]
        states = []  # before, after our merge, after the naive merge
        for merge in (lambda _: None, self.local_merge, partial(naive_merge, self.modules)):
            merge(self.scales(1.0, 1.5))
            states.append([tensor.clone() for tensor in tensors])
            for tensor, before in zip(tensors, states[0], strict=True):
                tensor.copy_(before)
        weights = list(zip(*states, strict=True))[: len(self.modules)]
        difference = max(float((x - y).abs().max() / w.abs().max()) for w, x, y in weights)
        increment = max(float((x - w).abs().max() / w.abs().max()) for w, x, _ in weights)
        difference, increment = self.world.max(difference, increment)
        return {"difference": difference, "increment": increment}


def measure(bench: Bench, rounds: int) -> dict[str, Any]:
    """Time ``rounds`` rounds. A first round is dropped: engines set themselves up in it."""
    unchanged = bench.scales(1.0, 1.0)
    work: dict[str, Callable[[], None]] = {
        "lora_step": bench.lora_step,
        "scalora_step": bench.scalora_step,
        "local_merge": partial(bench.local_merge, unchanged),
    }
    if all(hasattr(module.weight, "ds_id") for module in bench.modules.values()):  # ZeRO-3
        work["naive_merge"] = partial(naive_merge, bench.modules, unchanged)
    history = []
    for _ in range(1 + rounds):
        now = {name: bench.time(function) for name, function in work.items()}
        now |= dict(zip(bench.seconds, bench.world.max(*bench.seconds.values()), strict=True))
        now["scalora_step_interval_10"] = (9 * now["lora_step"] + now["scalora_step"]) / 10
        now["interval_1"] = now["rescale"] / now["scalora_step"]
        now["interval_10"] = now["rescale"] / (10 * now["scalora_step_interval_10"])
        now["ratio"] = now.get("naive_merge", float("nan")) / now["local_merge"]
        history.append(now)

    def over_rounds(name: str) -> dict[str, float]:
        values = [now[name] for now in history[1:]]
        return {"median_s": median(values), "min_s": min(values), "max_s": max(values)}

    merges = bench.compare_merges() if "naive_merge" in work else None
    traffic = {name: Traffic() for name in (*work, "rescale")}
    work["scalora_step"] = partial(bench.scalora_step, traffic["rescale"])
    for name, function in work.items():
        with traffic[name]:
            function()
    return {
        "variants": {name: over_rounds(name) for name in (*work, *DERIVED)},
        "parts": {name: over_rounds(name) for name in bench.seconds if name != "rescale"},
        "shares": {name: over_rounds(name)["median_s"] for name in ("interval_1", "interval_10")},
        "naive_over_local": over_rounds("ratio")["median_s"],
        "merges": merges,
        "bytes": {k: {"sent": t.sent, "received": t.received} for k, t in traffic.items()},
        "collectives": {name: dict(t.collectives) for name, t in traffic.items()},
    }


def render(found: dict[str, Any]) -> str:
    """The figures as an aligned table."""
    heads = ("median ms", "min ms", "max ms", "sent MiB", "received MiB", "collectives")
    lines = [" " * 26 + "".join(f"{head:>13}" for head in heads)]
    for name, spread in (found["variants"] | found["parts"]).items():
        line = f"{name:<26}" + "".join(f"{1e3 * value:>13.1f}" for value in spread.values())
        if name in found["bytes"]:
            line += "".join(f"{count / 2**20:>13.3f}" for count in found["bytes"][name].values())
            line += f"{sum(found['collectives'][name].values()):>13}"
        lines.append(line)
    shares = ", ".join(f"{share:.2%} at {name}" for name, share in found["shares"].items())
    lines.append(f"rescale / step: {shares}")
    if merges := found["merges"]:
        lines[-1] += f"; naive / local merge: {found['naive_over_local']:.2f}"
        gap = merges["difference"] / merges["increment"]
        lines.append(f"naive and local W differ by {gap:.1e} of the increment, at most")
    return "\n".join(lines)


def run(options: Options, rounds: int) -> dict[str, Any] | None:
    """Start the trainer and measure. The figures, on rank 0. Collective."""
    world = join(options)
    trainer = Trainer(options, world)
    cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else f"{platform.machine()} CPU"
    found = {
        "device": f"{world.size} ranks, {device}, {torch.get_num_threads()} threads each",
        "versions": installed_versions("torch", "deepspeed", "transformers"),
        "adapted_layers": len(trainer.engine.adapted),
        "options": asdict(trainer.options),
        **measure(Bench(trainer), rounds),
    }
    trainer.close()
    world.leave()
    return found if world.is_main else None


def main(argv: list[str]) -> None:
    parser = Parser([BenchArguments], allow_abbrev=False, description=__doc__.partition("\n")[0])
    args, words = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--output_dir", folder, "--save_steps", "0", "--eval_size", "0"]
        found = run(parse_options([*words, *fixed]), args.rounds)
    if found:
        print(render(found), flush=True)
        if args.json:
            write_json(Path(args.json), found)


if __name__ == "__main__":
    # torch renamed collectives that DeepSpeed still calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with exit_with_one_sentence():
        main(sys.argv[1:])
