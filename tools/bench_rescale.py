"""What a rescale costs: steps, the rescale's parts and the naive merge, timed in one run.

    deepspeed --num_gpus 2 tools/bench_rescale.py --ds_config ds_configs/zero3.json \\
        --model_name_or_path MODEL [--rank 8 --steps 5 --length 64 --json out.json]

Everything runs on one engine and one model, on random tokens, `--steps` rounds of: a LoRA step, a
ScaLoRA step, our merge, the naive merge. So other load on the machine hits all of them alike.

A duration runs from all ranks' start together (device idle, barrier) to the end of the slowest
rank's work (device idle). A step is the trainer's: forward, backward, the sums over ranks, the
gradients' norm or the rescale, the optimizer. Inside a ScaLoRA step the ranks meet once more before
the rescale, so that it is not charged with waiting for a slower rank's backward. A step of
ScaLoRA-I off its interval is a LoRA step, so interval 10 is computed, not run: per round, nine LoRA
steps and one ScaLoRA step. Both merges are timed with increments of zero, which leave W as it was.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, Optional

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import HfArgumentParser

from scalora_dist.adapters.layers import LowRankLinear
from scalora_dist.config import (
    LaunchArguments,
    MethodArguments,
    ModelArguments,
    Options,
    TrainArguments,
    option,
)
from scalora_dist.data import DataArguments
from scalora_dist.engines.base import LayerShards
from scalora_dist.errors import UserError
from scalora_dist.loss import summed_cross_entropy
from scalora_dist.methods import add_layers, make_rescaler
from scalora_dist.metrics import write_json
from scalora_dist.rescale import _Clock
from scalora_dist.shards import global_norm
from scalora_dist.solve import Scales
from scalora_dist.trainer import hidden_size, load_model
from scalora_dist.world import World

PARTS = ("grams", "solve", "gather", "merge", "scale")
INTERVALS = (1, 10)


@dataclass
class BenchArguments:
    _argument_group_name = "bench"

    ds_config: Optional[str] = option(None, "DeepSpeed's JSON, e.g. ds_configs/zero3.json.")
    steps: int = option(5, "Rounds; medians, least and greatest are over these.")
    length: int = option(64, "Random tokens per example.")
    per_device_train_batch_size: int = option(2, "Examples of one rank and step.")
    bf16: bool = option(False, "bfloat16 weights.")
    json: Optional[str] = option(None, "Write the results here too.")
    local_rank: int = option(-1, "Set by the launcher.")

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("length", 2), ("per_device_train_batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: set at least {least}")
        if not self.ds_config:
            raise UserError("--ds_config is missing: name a JSON, e.g. ds_configs/zero3.json")
        if self.json and not Path(self.json).parent.is_dir():
            raise UserError(f"--json {self.json}: there is no such folder")


class Traffic(TorchDispatchMode):
    """Counts what goes through torch.distributed while it is entered, whoever calls: DeepSpeed too.

    ``sent`` and ``received`` are the bytes of the tensors that this rank hands to collectives and
    of those that they fill here, its own part included: what a backend really moves for one (a ring
    or a tree) is its own affair. Barriers carry nothing and are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = self.received = 0
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(func).partition(".")
        if namespace == "c10d" and not name.startswith("barrier"):
            tensors = [[x for x in tree_leaves(arg) if isinstance(x, Tensor)] for arg in args]
            # c10d's operators take (outputs, inputs, …) or one list of tensors that is both.
            sizes = [sum(x.nbytes for x in leaves) for leaves in tensors if leaves]
            self.received += sizes[0]
            self.sent += sizes[-1]
            self.collectives[name.partition(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))

    def counts(self) -> dict[str, Any]:
        collectives = {"total": self.collectives.total(), **self.collectives}
        return {"sent": self.sent, "received": self.received, "collectives": collectives}


def naive_merge(layers: Mapping[str, LowRankLinear], scales: Scales) -> None:
    """``W += s·A diag(1 − α∘β) Bᵀ`` layer by layer as DeepSpeed's documentation edits weights.

    Each W is gathered whole on every rank, edited on rank 0, sent to all and cut up again (below
    stage 3 nothing is cut up, and this cannot be used). Factors that ZeRO keeps gathered are left
    so: gathering them anew would cost this merge more, and the next step too.
    """
    # The one use of deepspeed outside engines/: the way of doing it that ours is measured against.
    from deepspeed.zero import GatheredParameters

    for layer, alpha, beta in zip(layers.values(), scales.alpha, scales.beta, strict=True):
        factors = [factor for factor in (layer.A, layer.B) if not factor.ds_persist]
        with torch.no_grad(), GatheredParameters([layer.weight, *factors], modifier_rank=0):
            if dist.get_rank() == 0:
                weight = (layer.scaling * (1 - alpha * beta)).to(layer.A)
                left, right = (layer.A * weight).to(layer.weight), layer.B.T.to(layer.weight)
                layer.weight.addmm_(left, right)


class Bench:
    """A model on an engine, and the things that are timed on it."""

    def __init__(self, options: Options, world: World, config: dict[str, Any], length: int) -> None:
        from scalora_dist.engines.deepspeed import DeepSpeedEngine

        self.world, self.engine = world, DeepSpeedEngine(world, config)
        with self.engine.loading():
            model = load_model(options, self.engine.dtype)
        method, train = options.method, options.train
        self.layers = add_layers(model, method, seed=train.seed, dtype=self.engine.dtype)
        self.engine.attach(
            model,
            self.layers,
            lambda parameters: torch.optim.AdamW(parameters, lr=train.learning_rate),
        )
        rescaler = make_rescaler(self.engine, method)
        if rescaler is None:
            raise UserError(f"--method {method.method} has nothing to rescale: leave it out")
        self.rescaler = rescaler
        generator = torch.Generator().manual_seed(train.seed + world.rank)
        shape = (train.per_device_train_batch_size, length)
        vocabulary = model.config.get_text_config().vocab_size
        self.tokens = torch.randint(vocabulary, shape, generator=generator).to(world.device)
        self.targets = world.size * shape[0] * (length - 1)
        self.rank_columns = (len(self.layers), method.rank)
        self.seconds: dict[str, float] = {}  # of the latest rescale, in all and by part
        self.rescale_traffic = Traffic()

    def meet(self) -> None:
        """Every rank's device is idle, and all ranks are here."""
        for wait in (self.synchronize, dist.barrier, self.synchronize):
            wait()

    def synchronize(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    def time(self, work: Callable[[], None]) -> float:
        """Seconds of ``work`` on the slowest rank, started together."""
        self.meet()
        started = time.perf_counter()
        work()
        self.synchronize()
        return self.world.max(time.perf_counter() - started)[0]

    def lora_step(self) -> None:
        def measure(layers: list[LayerShards]) -> bool:
            gradients = [grad for layer in layers for grad in (layer.grad_A, layer.grad_B)]
            return math.isfinite(global_norm(gradients, self.world.device))

        self._step(measure)

    def scalora_step(self, traffic: Traffic | None = None) -> None:
        """A step with a rescale, whose seconds go to ``self.seconds``, whose traffic is counted."""

        def rescale(layers: list[LayerShards]) -> bool:
            self.meet()
            started = time.perf_counter()
            if traffic is None:
                report = self.rescaler(layers)
            else:
                with traffic:
                    report = self.rescaler(layers)
            self.synchronize()
            self.seconds = {"rescale": time.perf_counter() - started, **report.seconds}
            return report.applied

        self._step(rescale)

    def _step(self, transform: Callable[[list[LayerShards]], bool]) -> None:
        logits = self.engine.module(input_ids=self.tokens, use_cache=False).logits
        loss = summed_cross_entropy(logits, self.tokens) / self.targets
        self.engine.backward(loss, last=True)
        (total,) = self.world.sum(float(loss))
        if not self.engine.step(transform):
            raise RuntimeError(f"the step was skipped (loss {total}): its times would mean nothing")

    def scales(self, low: float, high: float) -> Scales:
        """α and β at random between two numbers, the same on all ranks."""
        generator = torch.Generator().manual_seed(0)
        shape = (2, *self.rank_columns)
        alpha, beta = torch.empty(shape, dtype=torch.float64).uniform_(
            low, high, generator=generator
        )
        return Scales(alpha, beta, torch.ones(len(alpha), dtype=torch.int64))

    def local_merge(self, scales: Scales) -> None:
        """Our merge alone: the factors' gather and each rank's own ranges of W."""
        clock = _Clock(self.world.device)
        self.rescaler.merge(self.engine.layers(gradients=False), scales, clock)
