"""The least time that a step can take on a GPU and a network, if all else were perfect."""

from __future__ import annotations

from dataclasses import dataclass

from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.planning.arguments import PlanArguments
from scalora_dist.planning.plan import Plan
from scalora_dist.planning.residency import Message, others
from scalora_dist.profiling.gpus import GPUS


@dataclass(frozen=True)
class Floors:
    """Seconds. Products and messages may go on at once, so that a step takes at least the largest.

    Attributes:
        compute: of the products, recomputation included, at the data sheet's rate.
        memory: to read the weights that they multiply from the GPU's memory.
        links: for messages inside a node. network: between nodes.
        rescale: for one rescale's messages, over the slower of the two.
    """

    compute: float
    memory: float
    links: float
    network: float
    rescale: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.links, self.network)


def floors_of(plan: Plan, where: PlanArguments) -> Floors:
    gpu = GPUS[where.gpu]
    times = [_seconds(message, where) for message in plan.messages]
    return Floors(
        compute=plan.flops / (gpu.tflops * 1e12),
        memory=plan.reads / gpu.bandwidth,
        links=sum(inside for inside, _ in times),
        network=sum(between for _, between in times),
        rescale=max(
            map(sum, zip(*(_seconds(m, where) for m in plan.rescale), strict=True)), default=0
        ),
    )


def _seconds(message: Message, where: PlanArguments) -> tuple[float, float]:
    """Of a message over the links of a node, and between nodes."""
    inside = message.received / GPUS[where.gpu].link
    nodes = ceil_div(message.ranks, where.gpus_per_node)
    if nodes == 1:
        return inside, 0.0
    if not message.alike:
        return inside, message.received / (where.network * 1e9)
    # A node receives what it lacks of the whole once, through all of its GPUs' network cards.
    whole = message.received / others(message.ranks)
    return inside, others(nodes) * whole / (where.gpus_per_node * where.network * 1e9)
