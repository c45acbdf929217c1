"""Predicts the memory and the messages of a rescale on one rank, from the layouts that it works on.

The sizes follow what the methods allocate, batch by batch: `core/grams.py`, `methods/merger.py` and
`methods/carry.py` (``compression.py``). A layout is that of an engine, for a rank in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scalora_dist.config.method import MethodArguments
from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.core.grams import GramSums
from scalora_dist.core.host_pieces import SLOT_BYTES, SLOTS
from scalora_dist.core.layout import Layout
from scalora_dist.core.split_precision import SCRATCH_ELEMENTS
from scalora_dist.planning.compression import compression_of
from scalora_dist.planning.gram_sizes import (
    F32,
    F64,
    SPLIT,
    exchanged_bytes,
    layout_of,
    result_bytes,
    split_bytes,
    summed_bytes,
)
from scalora_dist.planning.residency import Message, Residency, Weight, others

# Columns in fp32 that the rule adamw holds for an element while it finds N: in the batch A, N and
# the gradient, and beside them the scaled gradient, its square, m and v (``AdamWDirection``).
DIRECTION = 3 + 4


@dataclass(frozen=True)
class Rescale:
    """Memory and messages of a rescale on one rank.

    Attributes:
        moments: {phase: {part: bytes}} beside what the rank keeps, at the peak of each phase:
            grams, compression (of a full carry) and merge, as far as the method has them.
        messages: messages that the rank receives.
    """

    moments: dict[str, dict[str, float]]
    messages: list[Message]


def rescale_of(
    args: MethodArguments, residency: Residency, weights: Sequence[Weight], *, on_host: bool
) -> Rescale:
    """
    Args:
        args: the resolved options of a method that merges.
        weights: all parameters of the model.
        on_host: whether the weights that it merges into are in the host's memory.
    """
    shapes = [weight.matrix for weight in weights if weight.trained and weight.part == "adapters"]
    factors = layout_of(residency.sharding, shapes, residency.ranks)
    moments: dict[str, dict[str, float]] = {}
    messages: list[Message] = []
    if args.reads("scaling_rule"):
        moments["grams"], messages = _grams(factors, args, residency.world)
    carry = [weight for weight in weights if weight.part == "carry"]
    if carry:
        moments["compression"], more = compression_of(carry, residency)
        messages += more
    scratch = float(SLOTS * SLOT_BYTES) if on_host else _scratch(weights, residency)
    moments["merge"] = _merge(factors, carry, scratch)
    messages += _whole(factors)
    return Rescale(moments, [message for message in messages if message.received])


def _whole(factors: Layout) -> list[Message]:
    """The gather of A and B (``Layout.gather_stacks``)."""
    ranks, gathered, summed = len(factors.ranges), 0, 0
    for (rows, cols), share in zip(factors.shapes, factors.shares, strict=True):
        gathered += F32 * share * ranks  # with padding
        summed += 0 if share else F32 * rows * cols
    return [
        Message("A and B whole", others(ranks) * gathered, ranks),
        Message("A and B, summed", 2 * others(ranks) * summed, ranks, summed=True),
    ]


def _grams(
    factors: Layout, args: MethodArguments, world: int
) -> tuple[dict[str, float], list[Message]]:
    """Grams of the factors and of what moves them (``Rescaler``): parts of memory, and messages."""
    adamw, sums, ranks = args.scaling_rule == "adamw", GramSums(factors), len(factors.ranges)
    grams = result_bytes(sums, 2, squares=adamw)
    made, kept = (DIRECTION * F32, 3 * F32) if adamw else (2 * F32, 2 * F32)
    columns = max((summed_bytes(batch, 2, made, kept) for batch in factors.batches), default=0.0)
    shares = world * ceil_div(len(factors.shapes) // 2, world)  # rows of layers, with padding
    scales = F64 * (2 * args.rank + 1) * shares
    return {"columns": columns, "grams": grams, SPLIT: split_bytes(sums, 2)}, [
        Message("grams", 2 * others(ranks) * grams, ranks, summed=True),
        Message(SPLIT, exchanged_bytes(sums, 2), ranks, summed=True),
        Message("scales", others(world) * scales, world),
    ]


def _merge(factors: Layout, carry: Sequence[Weight], scratch: float) -> dict[str, float]:
    """Full A and B of a bucket of layers, and what one merge takes beside them (``Merger``).

    Args:
        scratch: bytes of the scratch of a merge into W.
    """
    pairs = [(i, i + 1) for i in range(0, len(factors.shapes), 2)]
    numel = [rows * cols for rows, cols in factors.shapes]
    whole = max(F32 * sum(numel[i] for i in bucket) for bucket in factors.buckets(pairs))
    ranks = len(factors.ranges)
    gather = 0.0
    if ranks > 1:  # what is received, beside what is made of it; or what is sent, beside the sum
        gather = whole if any(factors.shares) else whole / ranks
    if carry:  # the balanced columns of one layer, and those of one side beside their halves
        most = max(numel[i] + numel[i + 1] for i, _ in pairs)
        halves = 3 if any(weight.low for weight in carry) else 0
        scratch = F32 * (most + (1 + halves) * max(numel))
    return {"A and B whole": whole, "scratch": max(gather, scratch)}


def _scratch(weights: Sequence[Weight], residency: Residency) -> float:
    """Of a CPU's merge into 16 bits (``add_with_pytorch_``). A GPU's kernel needs none."""
    found = 0.0
    for weight in weights:
        if weight.merged and weight.stored < F32:
            cols = weight.matrix[1]
            piece = min(residency.share(weight), cols * max(1, SCRATCH_ELEMENTS // cols))
            # The increment; for low halves also W in fp32, then the bits of the sum.
            found = max(found, (2 if weight.low else 1) * F32 * piece)
    return found
