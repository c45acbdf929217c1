"""Plans a run and variants of it, and finds what to change if the run does not fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scalora_dist.config.options import Options
from scalora_dist.config.shipped import DS_CONFIGS, shipped_ds_config
from scalora_dist.engines.build import check_engine_choice
from scalora_dist.errors import UserError
from scalora_dist.methods.registry import find_method, resolve_merge_options
from scalora_dist.modeling.load import BaseModelSpec, read_base_model
from scalora_dist.planning.arguments import PlanArguments
from scalora_dist.planning.plan import GIB, Plan, pick_residency, plan_of
from scalora_dist.planning.traced_model import Traced, trace_model
from scalora_dist.planning.zero_residency import offloads
from scalora_dist.profiling.gpus import GPUS

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
            options: options of the run; not changed.
            gpus: number of ranks.

        Raises:
            UserError: the trainer would refuse these options.
        """
        options = copy.deepcopy(options)
        options.train.settle_batch(gpus)
        check_engine_choice(options, gpus)
        # The trace uses SDPA's flash attention, which runs on every machine.
        if (options.model.attn_implementation or "").startswith("flash"):
            options.model.attn_implementation = None
        base = read_base_model(options.model, options.train.dtype, torch.device("meta"))
        method = find_method(options.method)
        resolve_merge_options(options.method, method, quantized=base.fourbit is not None)
        residency, compute = pick_residency(options, base, gpus)
        traced = self._trace(options, base, compute)
        residency.see(traced.blocks)
        return plan_of(options, residency, traced)

    def _trace(self, options: Options, base: BaseModelSpec, compute: torch.dtype) -> Traced:
        train = options.train
        key = (train.per_device_train_batch_size, train.gradient_checkpointing, base, compute)
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
        together = copy.deepcopy(self.options)
        words: list[str] = []
        for change in CHANGES:
            alone = copy.deepcopy(self.options)
            if word := change(alone, self.where.gpus):
                if word.startswith("--ds_config"):  # replaces an earlier one
                    words = [x for x in words if not x.startswith("--ds_config")]
                words.append(change(together, self.where.gpus))
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
            options = copy.deepcopy(self.options)
            words = [change(options, gpus) for change in (_any_mesh, *CHANGES[:3])]
            # The global batch size need not be divisible by this number of GPUs.
            options.train.train_batch_size, options.train.gradient_accumulation_steps = None, 1
            plan = self._try(options, gpus)
            if plan and self.fits(plan):
                return gpus, " ".join(filter(None, words)), plan
        return None

    def _try(self, options: Options, gpus: int) -> Plan | None:
        try:
            return self.plan(options, gpus)
        except UserError:  # for example a mesh or a batch that does not fit this number of GPUs
            return None


# A change edits the options so that the run needs less memory. It returns the words of the command
# line for this, or "" if there is nothing to change.


def _checkpoint(options: Options, gpus: int) -> str:
    if options.train.gradient_checkpointing:
        return ""
    options.train.gradient_checkpointing = True
    return "--gradient_checkpointing"


def _one_example(options: Options, gpus: int) -> str:
    train = options.train
    if train.per_device_train_batch_size == 1:
        return ""
    if train.train_batch_size is None:
        train.gradient_accumulation_steps *= train.per_device_train_batch_size
    else:
        train.gradient_accumulation_steps = 1  # computed again from the global batch size
    train.per_device_train_batch_size = 1
    return "--per_device_train_batch_size 1"


def _shard_weights(options: Options, gpus: int) -> str:
    if gpus == 1 or options.launch.fsdp or _zero(options).get("stage") == 3:
        return ""
    return _with_ds_config(options, "zero3.json")


def _any_mesh(options: Options, gpus: int) -> str:
    """Drop the FSDP config: its mesh fits only one number of GPUs."""
    if not options.launch.fsdp_config:
        return ""
    options.launch.fsdp_config = None
    return "--fsdp alone"


def _offload(options: Options, gpus: int) -> str:
    if options.launch.fsdp or offloads(_zero(options), "offload_param"):
        return ""
    return _with_ds_config(options, "zero3_offload.json")


def _quantize(options: Options, gpus: int) -> str:
    if options.model.load_in_4bit or find_method(options.method).needs_dense:
        return ""
    options.model.load_in_4bit = True
    return "--load_in_4bit"


CHANGES: list[Callable[[Options, int], str]] = [
    *(_checkpoint, _one_example, _shard_weights, _offload, _quantize)
]


def _with_ds_config(options: Options, name: str) -> str:
    path = shipped_ds_config(name)
    if path is None:
        return ""
    options.launch.ds_config = str(path)
    return f"--ds_config {DS_CONFIGS}/{name}"


def _zero(options: Options) -> dict[str, Any]:
    path = options.launch.ds_config
    return (json.loads(Path(path).read_text()).get("zero_optimization") or {}) if path else {}
