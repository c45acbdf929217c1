"""Predicts the memory and the messages of a rescale on one rank, from the layouts that it works on.

The sizes follow what the methods allocate, batch by batch: `core/grams.py`, `methods/merger.py` and
`methods/carry.py`. A layout is that of an engine, for a rank in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scalora_dist.config.method import MethodArguments
from scalora_dist.core.arithmetic import ceil_div, mostly_padding
from scalora_dist.core.grams import GramSums
from scalora_dist.core.host_pieces import SLOT_BYTES, SLOTS
from scalora_dist.core.layout import Batch, Layout
from scalora_dist.core.split_precision import SCRATCH_ELEMENTS
from scalora_dist.planning.ranges import Sharding, ranges_of
from scalora_dist.planning.residency import Message, Residency, Weight, others

SPLIT = "split rows"
F32, F64 = torch.float32.itemsize, torch.float64.itemsize
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
        moments["compression"], more = _compression(carry, residency)
        messages += more
    scratch = float(SLOTS * SLOT_BYTES) if on_host else _scratch(weights, residency)
    moments["merge"] = _merge(factors, carry, scratch)
    messages += _whole(factors)
    return Rescale(moments, [message for message in messages if message.received])


def layout_of(sharding: Sharding, shapes: Sequence[tuple[int, int]], ranks: int) -> Layout:
    """The layout of a rank in the middle, which shares rows with both neighbours."""
    if sharding == "local":  # every rank has all, and they share nothing
        ranks = 1
    ranges = ranges_of(sharding, shapes, ranks).numpy()
    return Layout(list(shapes), ranges, None, torch.device("cpu"), ranks // 2)


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
    grams = _result(sums, 2, squares=adamw)
    made, kept = (DIRECTION * F32, 3 * F32) if adamw else (2 * F32, 2 * F32)
    columns = max((_summed(batch, 2, made, kept) for batch in factors.batches), default=0.0)
    shares = world * ceil_div(len(factors.shapes) // 2, world)  # rows of layers, with padding
    scales = F64 * (2 * args.rank + 1) * shares
    return {"columns": columns, "grams": grams, SPLIT: _split(sums, 2)}, [
        Message("grams", 2 * others(ranks) * grams, ranks, summed=True),
        Message(SPLIT, _exchanged(sums, 2), ranks, summed=True),
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


def _compression(
    carry: Sequence[Weight], residency: Residency
) -> tuple[dict[str, float], list[Message]]:
    """Full carries (``Carry.compress``): parts of memory for a bucket at its peak, and messages.

    A carry is full once in ``carry_room / rank`` merges.
    """
    # Frozen matrices are whole on each rank where only the buffer of trained ones is cut.
    sharding = "local" if residency.cuts_a_buffer else residency.sharding
    layout = layout_of(sharding, [weight.matrix for weight in carry], residency.ranks)
    pairs = [(i, i + 1) for i in range(0, len(carry), 2)]
    halves = any(weight.low for weight in carry)
    found: list[dict[str, float]] = []
    exchanged, gathered, added, world = 0.0, 0.0, 0.0, residency.world
    for bucket in layout.buckets(pairs):
        sums = GramSums(layout.only(bucket))
        grams = _result(sums, 1, squares=False)
        # The pieces in 16 bits, beside W in fp32 that is made of them.
        made = 2 * F32 if halves else F32
        summed = max((_summed(b, 1, made, F32) for b in sums.layout.batches), default=0.0)
        mixed = max((_mixed(b, halves=halves) for b in sums.layout.batches), default=0.0)
        layers, row = len(bucket) // 2, F64 * (2 * sums.cols**2 + 3)
        if mostly_padding(layers, world):  # as in World.gather_table
            table = row * layers
            added += table
        else:
            table = row * world * ceil_div(layers, world)
            gathered += table
        # The matrices that mix the columns are as large as the grams. They are copied from the
        # table, which is then freed.
        moments = ((summed, grams), (0.0, 2 * grams + table), (mixed, 2 * grams))
        columns, beside = max(moments, key=sum)
        found.append({"carry's columns": columns, "carry's grams": beside, SPLIT: _split(sums, 1)})
        exchanged += _exchanged(sums, 1)
    ranks = len(layout.ranges)
    grams = _result(GramSums(layout), 1, squares=False)
    return max(found, key=lambda parts: sum(parts.values())), [
        Message("grams of a carry", 2 * others(ranks) * grams, ranks, summed=True),
        Message("split rows of a carry", exchanged, ranks, summed=True),
        Message("solutions of a carry", others(world) * gathered, world),
        Message("solutions of a carry, summed", 2 * others(world) * added, world, summed=True),
    ]


def _result(sums: GramSums, k: int, *, squares: bool) -> float:
    """Bytes of the grams of all matrices, and of the squares of one more matrix's columns."""
    return F64 * len(sums.layout.shapes) * ((k * sums.cols) ** 2 + sums.cols * squares)


def _split(sums: GramSums, k: int) -> float:
    """Bytes of the complete first and last rows (``Grams.ends``), and of their exchange."""
    if not sums.any_shared:
        return 0
    ends = F64 * len(sums.layout.shapes) * 2 * k * sums.cols
    return ends + max(2 * _exchanged(sums, k), ends)  # then they are counted on one rank each


def _exchanged(sums: GramSums, k: int) -> float:
    """Bytes of the parts of split rows that this rank receives."""
    if not sums.any_shared:
        return 0
    places, _ = sums.shared
    return F64 * len(places) * k * sums.cols


def _rows(batch: Batch, k: int) -> list[tuple[float, float]]:
    """For each group: bytes of its touched rows in fp32 (0: a view) and float64."""
    found: list[tuple[float, float]] = []
    for group in batch:
        elements = k * len(group.which) * group.rows * group.cols
        found.append((F32 * elements if group.head or group.tail else 0, F64 * elements))
    return found


def _summed(batch: Batch, k: int, made: int, kept: int) -> float:
    """Peak of a batch of k columns in ``GramSums.__call__``.

    Args:
        made: bytes of an element while the columns are made.
        kept: bytes of an element afterwards.
    """
    elements, before, most = batch[-1].flat.stop, 0.0, 0.0
    for padded, rows in _rows(batch, k):  # the rows of a group are freed after the next are there
        most, before = max(most, before + padded + rows), rows
    return max(made * elements, kept * elements + most)


def _mixed(batch: Batch, *, halves: bool) -> float:
    """Peak of a batch in ``GramSums.mixed`` and ``Carry.compress``.

    Args:
        halves: whether the carries are in 16 bits with low halves.
    """
    elements, (padded, last) = batch[-1].flat.stop, _rows(batch, 1)[-1]
    # All products and their copy in order, then in fp32 and in halves. Of the last group also the
    # rows, and the padded product where the result is a part of it.
    each = 2 * F64 + F32 + (3 * F32 if halves else 0)
    return each * elements + (2 if padded else 1) * last
