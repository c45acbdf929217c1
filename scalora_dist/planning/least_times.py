"""Computes lower bounds of a step's time, from the rates of a GPU and a network."""

from __future__ import annotations

from dataclasses import dataclass

from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.planning.arguments import PlanArguments
from scalora_dist.planning.launches import LAUNCH_SECONDS
from scalora_dist.planning.plan import Plan
from scalora_dist.planning.residency import Message, others
from scalora_dist.profiling.gpus import GPUS


@dataclass(frozen=True)
class LeastTimes:
    """Lower bounds of times, in seconds.

    Products, messages and copies may overlap, so a step takes at least the largest of these times.

    Attributes:
        compute: time of the products, recomputation included, at the data sheet's rate.
        memory: time to read the weights of these products from the GPU's memory.
        links: time of a step's messages inside a node.
        network: time of a step's messages between nodes.
        rescale: time of one rescale's messages: the larger of inside a node and between nodes.
        launches: time in which the host launches the kernels of a step without a rescale.
        rescale_launches: time in which it launches those of one rescale.
        bus: time of a step's copies between the host's memory and the GPU.
        rescale_bus: time of those of one rescale.
    """

    compute: float
    memory: float
    links: float
    network: float
    rescale: float
    launches: float
    rescale_launches: float
    bus: float
    rescale_bus: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.links, self.network, self.launches, self.bus)


def least_times_of(plan: Plan, where: PlanArguments) -> LeastTimes:
    gpu = GPUS[where.gpu]
    times = [_seconds(message, where) for message in plan.messages]
    return LeastTimes(
        compute=plan.flops / (gpu.tflops * 1e12),
        memory=plan.reads / gpu.bandwidth,
        links=sum(inside for inside, _ in times),
        network=sum(between for _, between in times),
        rescale=max(
            map(sum, zip(*(_seconds(m, where) for m in plan.rescale), strict=True)), default=0
        ),
        launches=LAUNCH_SECONDS * plan.launches,
        rescale_launches=LAUNCH_SECONDS * plan.rescale_launches,
        bus=plan.copied / gpu.bus,
        rescale_bus=plan.rescale_copied / gpu.bus,
    )


def _seconds(message: Message, where: PlanArguments) -> tuple[float, float]:
    """Seconds of a message over the links inside a node, and between nodes."""
    inside = message.received / GPUS[where.gpu].link
    nodes = ceil_div(message.ranks, where.gpus_per_node)
    if nodes == 1:
        return inside, 0.0
    if not message.alike:
        return inside, message.received / (where.network * 1e9)
    # A node receives the missing part of the full message once, through all its network cards.
    whole = message.received / others(message.ranks)
    return inside, others(nodes) * whole / (where.gpus_per_node * where.network * 1e9)
