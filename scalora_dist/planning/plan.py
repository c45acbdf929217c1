"""Makes a plan: a rank's memory by part at the peak of each phase of a step, and its messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from scalora_dist.config.options import Options
from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.modeling.load import BaseModelSpec
from scalora_dist.planning.launches import BESIDE_MERGES, optimizer_launches
from scalora_dist.planning.rescale import Rescale, rescale_of
from scalora_dist.planning.residency import (
    Held,
    LocalResidency,
    Message,
    Residency,
    Weight,
    others,
)
from scalora_dist.planning.staging import host_bytes, staged_parts
from scalora_dist.planning.trace import Event
from scalora_dist.planning.traced_model import Traced

GIB = 2**30


@dataclass(frozen=True)
class Moment:
    """Memory of one rank's device at the peak of a phase.

    Attributes:
        phase: forward, backward, grams, compression (of a carry), merge or optimizer.
        parts: {part: bytes}.
    """

    phase: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """The predicted memory, messages and work of one rank in a step.

    Attributes:
        options: the resolved options of the run.
        world: world size.
        held: memory that a rank needs during the full step.
        phases: memory at the peak of each phase of a step, as far as the method has it.
        messages: messages that a rank receives in a step.
        rescale: messages that a rank receives in a rescale; empty if there is none.
        flops: floating-point operations of a rank's step, recomputation included.
        reads: bytes of weights that the products of a rank's step read.
        trained: number of trained elements of the full model.
        launches: kernels of a step without a rescale that the host launches, at least.
        rescale_launches: kernels of a rescale that it launches, at least; 0 if there is none.
        copied: bytes between the host and the device in a step. Of two copies that run at the same
            time, one up and one down, only the larger counts.
        rescale_copied: such bytes in a rescale.
        staged: bytes of the copies that a save makes on the host.
    """

    options: Options
    world: int
    held: Held
    phases: list[Moment]
    messages: list[Message]
    rescale: list[Message]
    flops: float
    reads: float
    trained: int
    launches: int
    rescale_launches: int
    copied: float
    rescale_copied: float
    staged: float

    @property
    def gathered(self) -> float:
        """Bytes that all-gathers fill on a rank in a step with a rescale, own part included."""
        messages = [*self.messages, *self.rescale]
        parts = [m for m in messages if not m.summed]
        return sum(m.received / others(m.ranks) for m in parts if m.ranks > 1)

    @property
    def peak(self) -> Moment:
        return max(self.phases, key=lambda moment: moment.total)


def pick_residency(
    options: Options, base: BaseModelSpec, world: int
) -> tuple[Residency, torch.dtype]:
    """The ``Residency`` of the engine that the command line asks for, and its compute dtype."""
    launch, train = options.launch, options.train
    if launch.ds_config:
        from scalora_dist.engines.ds_config import load_ds_config
        from scalora_dist.planning.zero_residency import ZeroResidency

        config = load_ds_config(
            launch.ds_config, train, world_size=world, hidden_size=base.hidden_size
        )
        return ZeroResidency(config, world), train.dtype
    if launch.fsdp:
        from scalora_dist.engines.fsdp_config import load_fsdp_config
        from scalora_dist.planning.fsdp_residency import FSDPResidency

        settings = load_fsdp_config(launch.fsdp_config, train, world_size=world)
        return FSDPResidency(settings, world), settings.param_dtype or train.dtype
    return LocalResidency(), train.dtype


def plan_of(options: Options, residency: Residency, traced: Traced) -> Plan:
    weights, events = traced.weights, traced.trace.events
    micro_batches = options.train.gradient_accumulation_steps
    held = residency.held(weights, micro_batches)
    held.device["buffers"] = traced.buffers
    if traced.trace.offloaded:
        held.host["activations"] = traced.trace.offloaded
    gathers = residency.gathers(weights, events)
    phases = []
    for backward in (False, True):
        worst = max(
            (i for i, event in enumerate(events) if event.backward == backward),
            key=lambda i: gathers[i] + events[i].most,
        )
        event, parts = events[worst], dict(held.device)
        if not backward:
            for name in ("gradients", "engine buffers"):
                parts[name] = parts.get(name, 0) if micro_batches > 1 else 0
        parts["gathered weights"] = gathers[worst]
        logits = _logits(events, worst, traced.head)
        parts |= {"logits": logits, "activations": event.most - logits}
        phases.append(Moment("backward" if backward else "forward", parts))
    rescale = Rescale({}, [])
    if options.method.merge_target:
        on_host = "base" in held.host
        rescale = rescale_of(options.method, residency, weights, on_host=on_host)
        phases += [Moment(name, held.device | most) for name, most in rescale.moments.items()]
    phases.append(Moment("optimizer", held.device | {"step's own": held.during_step}))
    matrices = sum(weight.nbytes for weight in weights if len(weight.shape) > 1)
    passes = 3 if options.train.gradient_checkpointing else 2
    staged = staged_parts(weights, residency, held)
    held.host["a checkpoint on its way"] = host_bytes(staged)
    messages = residency.wire(weights, events, micro_batches)
    return Plan(
        options=options,
        world=residency.world,
        held=held,
        phases=phases,
        messages=messages,
        rescale=rescale.messages,
        flops=micro_batches * traced.trace.flops,
        reads=micro_batches * passes * matrices,
        trained=sum(w.numel for w in weights if w.trained),
        launches=_launches(options, residency, traced),
        rescale_launches=len(traced.shapes) + BESIDE_MERGES if options.method.merge_target else 0,
        copied=max(micro_batches * traced.trace.sent, sum(m.uploaded for m in messages))
        + micro_batches * traced.trace.fetched,
        rescale_copied=_merged_on_host(residency, weights) if "base" in held.host else 0.0,
        staged=sum(part.nbytes for part in staged),
    )


def _merged_on_host(residency: Residency, weights: Sequence[Weight]) -> float:
    """Bytes of W and its low halves on a rank that merges copy up, and down meanwhile."""
    merged = (weight for weight in weights if weight.merged)
    return sum(residency.share(weight) * (weight.stored + weight.low) for weight in merged)


def _launches(options: Options, residency: Residency, traced: Traced) -> int:
    """Kernels of a step without a rescale. Compiled blocks launch fewer: theirs are not counted."""
    trained = [weight.numel for weight in traced.weights if weight.trained]
    if residency.steps_a_buffer:
        trained = [sum(trained)]
    optimizer = optimizer_launches([ceil_div(numel, residency.ranks) for numel in trained])
    if options.train.torch_compile:
        return optimizer
    return options.train.gradient_accumulation_steps * traced.trace.kernels.total + optimizer


def _logits(events: Sequence[Event], worst: int, head: str) -> int:
    """Bytes of an event's activations that the LM head made; 0 outside the head's passes.

    Args:
        events: the trace's events in order.
        worst: index of the event.
        head: the LM head's name.
    """
    begins = next((i for i, event in enumerate(events) if event.module == head), len(events))
    event = events[worst]
    if worst < begins or (event.backward and event.module not in ("", head)):
        return 0
    return event.most - events[begins].live
