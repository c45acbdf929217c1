"""Plans a run and variants of it, and finds what to change if the run does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from scalora_dist.config.options import Options
from scalora_dist.config.shipped import find
from scalora_dist.errors import UserError
from scalora_dist.methods.registry import METHODS
from scalora_dist.modeling.load import BaseModelSpec, read_base_model
from scalora_dist.planning.arguments import PlanArguments
from scalora_dist.planning.plan import GIB, Plan, pick_residency, plan_of
from scalora_dist.planning.traced_model import Traced, trace_model
from scalora_dist.planning.zero_residency import offloads
from scalora_dist.profiling.gpus import GPUS
from scalora_dist.training.resolve import resolve

MOST_GPUS = 1024


class Planner:
    """Plans one run and its variants. Variants that have the same micro-batch share one trace.

    Attributes:
        options: options of the run.
        where: the cluster.
        traces: {settings that change the trace: trace}.
    """

    def __init__(self, options: Options, where: PlanArguments) -> None:
        self.options = options
        self.where = where
        self.traces: dict[tuple[object, ...], Traced] = {}

    def plan(self, options: Options, gpus: int) -> Plan:
        """Plan a run. Loads no weights.

        Args:
            options: options of the run, as they were given.
            gpus: number of ranks.

        Raises:
            UserError: the trainer would refuse these options.
        """
        # The trace uses SDPA's flash attention, which runs on every machine.
        if (options.model.attn_implementation or "").startswith("flash"):
            options = options.having(attn_implementation=None)
        base = read_base_model(options.model, options.train.dtype, torch.device("meta"))
        options = resolve(options, gpus, base)
        residency, compute = pick_residency(options, base, gpus)
        traced = self._trace(options, base, compute)
        residency.see(traced.blocks)
        return plan_of(options.having(max_length=traced.length), residency, traced)

    def _trace(self, options: Options, base: BaseModelSpec, compute: torch.dtype) -> Traced:
        train = options.train
        key = (
            train.per_device_train_batch_size,
            train.gradient_checkpointing,
            train.activation_offloading,
            base,
            compute,
        )
        if key not in self.traces:
            self.traces[key] = trace_model(options, base, compute)
        return self.traces[key]

    @property
    def room(self) -> float:
        """Bytes of one GPU's memory that a plan may use."""
        return (GPUS[self.where.gpu].memory_gib - self.where.reserve) * GIB

    def fits(self, plan: Plan) -> bool:
        return plan.peak.total <= self.room

    def what_to_change(self) -> tuple[str, Plan] | None:
        """The options to add so that the run fits on its GPUs, and the changed plan; None: none.

        Tries each change of ``CHANGES`` alone, and together with all changes before it.
        """
        together = self.options
        words: list[str] = []
        for change in CHANGES:
            alone, word = change(self.options, self.where.gpus)
            if word:
                if word.startswith("--ds_config"):  # replaces an earlier one
                    words = [x for x in words if not x.startswith("--ds_config")]
                together, added = change(together, self.where.gpus)
                words.append(added)
                for options, said in ((alone, word), (together, " ".join(words))):
                    plan = self._try(options, self.where.gpus)
                    if plan and self.fits(plan):
                        return said, plan
        return None

    def smallest(self) -> tuple[int, str, Plan] | None:
        """The fewest GPUs of this kind on which the run fits, the options to change, and the plan.

        Tries powers of two, with gradient checkpointing, one example per micro-batch, and stage 3.
        """
        for gpus in (2**i for i in range(MOST_GPUS.bit_length())):
            options, words = self.options, []
            for change in (_any_mesh, *CHANGES[:3]):
                options, added = change(options, gpus)
                words.append(added)
            # The global batch size need not be divisible by this number of GPUs.
            options = options.having(train_batch_size=None, gradient_accumulation_steps=1)
            plan = self._try(options, gpus)
            if plan and self.fits(plan):
                return gpus, " ".join(filter(None, words)), plan
        return None

    def _try(self, options: Options, gpus: int) -> Plan | None:
        try:
            return self.plan(options, gpus)
        except UserError:  # for example a mesh or a batch that does not fit this number of GPUs
            return None


# A change returns options with which the run needs less memory, and the words of the command line
# for this: "" if there is nothing to change.
Change: TypeAlias = Callable[[Options, int], tuple[Options, str]]


def _checkpoint(options: Options, gpus: int) -> tuple[Options, str]:
    if options.train.gradient_checkpointing:
        return options, ""
    return options.having(gradient_checkpointing=True), "--gradient_checkpointing"


def _one_example(options: Options, gpus: int) -> tuple[Options, str]:
    train, one = options.train, "--per_device_train_batch_size 1"
    if train.per_device_train_batch_size == 1:
        return options, ""
    # Computed again from the global batch size, where that is given.
    accumulation = 1
    if train.train_batch_size is None:
        accumulation = train.gradient_accumulation_steps * train.per_device_train_batch_size
    return options.having(
        per_device_train_batch_size=1, gradient_accumulation_steps=accumulation
    ), one


def _shard_weights(options: Options, gpus: int) -> tuple[Options, str]:
    if gpus == 1 or options.launch.fsdp or _zero(options).get("stage") == 3:
        return options, ""
    return _with_ds_config(options, "zero3")


def _any_mesh(options: Options, gpus: int) -> tuple[Options, str]:
    """Drop the FSDP config: its mesh fits only one number of GPUs."""
    if not options.launch.fsdp_config:
        return options, ""
    return options.having(fsdp_config=None), "--fsdp alone"


def _offload(options: Options, gpus: int) -> tuple[Options, str]:
    if options.launch.fsdp or offloads(_zero(options), "offload_param"):
        return options, ""
    return _with_ds_config(options, "zero3_offload")


def _quantize(options: Options, gpus: int) -> tuple[Options, str]:
    if options.model.load_in_4bit or METHODS[options.method.name].needs_dense:
        return options, ""
    return options.having(load_in_4bit=True), "--load_in_4bit"


CHANGES: list[Change] = [_checkpoint, _one_example, _shard_weights, _offload, _quantize]


def _with_ds_config(options: Options, name: str) -> tuple[Options, str]:
    return options.having(ds_config=str(find("ds_configs", name))), f"--ds_config {name}"


def _zero(options: Options) -> dict[str, Any]:
    path = options.launch.ds_config
    return (json.loads(Path(path).read_text()).get("zero_optimization") or {}) if path else {}
