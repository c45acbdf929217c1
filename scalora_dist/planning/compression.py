"""Predicts the memory and the messages of full carries' compression on one rank.

The sizes follow what ``methods/carry.py`` allocates, bucket by bucket and batch by batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from scalora_dist.core.arithmetic import ceil_div, mostly_padding
from scalora_dist.core.grams import GramSums
from scalora_dist.core.layout import Batch
from scalora_dist.planning.gram_sizes import (
    F32,
    F64,
    SPLIT,
    exchanged_bytes,
    layout_of,
    result_bytes,
    rows_of,
    split_bytes,
    summed_bytes,
)
from scalora_dist.planning.residency import Message, Residency, Weight, others


def compression_of(
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
        grams = result_bytes(sums, 1, squares=False)
        # The pieces in 16 bits, beside W in fp32 that is made of them.
        made = 2 * F32 if halves else F32
        summed = max((summed_bytes(b, 1, made, F32) for b in sums.layout.batches), default=0.0)
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
        found.append(
            {"carry's columns": columns, "carry's grams": beside, SPLIT: split_bytes(sums, 1)}
        )
        exchanged += exchanged_bytes(sums, 1)
    ranks = len(layout.ranges)
    grams = result_bytes(GramSums(layout), 1, squares=False)
    return max(found, key=lambda parts: sum(parts.values())), [
        Message("grams of a carry", 2 * others(ranks) * grams, ranks, summed=True),
        Message("split rows of a carry", exchanged, ranks, summed=True),
        Message("solutions of a carry", others(world) * gathered, world),
        Message("solutions of a carry, summed", 2 * others(world) * added, world, summed=True),
    ]


def _mixed(batch: Batch, *, halves: bool) -> float:
    """Peak of a batch in ``GramSums.mixed`` and ``Carry.compress``.

    Args:
        halves: whether the carries are in 16 bits with low halves.
    """
    elements, (padded, last) = batch[-1].flat.stop, rows_of(batch, 1)[-1]
    # All products and their copy in order, then in fp32 and in halves. Of the last group also the
    # rows, and the padded product where the result is a part of it.
    each = 2 * F64 + F32 + (3 * F32 if halves else 0)
    return each * elements + (2 if padded else 1) * last
