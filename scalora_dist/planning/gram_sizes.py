"""Sizes of grams of sharded matrices on one rank, as ``core/grams.py`` allocates and sends them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scalora_dist.core.grams import GramSums
from scalora_dist.core.layout import Batch, Layout
from scalora_dist.planning.ranges import Sharding, ranges_of

SPLIT = "split rows"
F32, F64 = torch.float32.itemsize, torch.float64.itemsize


def layout_of(sharding: Sharding, shapes: Sequence[tuple[int, int]], ranks: int) -> Layout:
    """The layout of a rank in the middle, which shares rows with both neighbours."""
    if sharding == "local":  # every rank has all, and they share nothing
        ranks = 1
    ranges = ranges_of(sharding, shapes, ranks).numpy()
    return Layout(list(shapes), ranges, None, torch.device("cpu"), ranks // 2)


def result_bytes(sums: GramSums, k: int, *, squares: bool) -> float:
    """Bytes of the grams of all matrices, and of the squares of one more matrix's columns."""
    return F64 * len(sums.layout.shapes) * ((k * sums.cols) ** 2 + sums.cols * squares)


def split_bytes(sums: GramSums, k: int) -> float:
    """Bytes of the complete first and last rows (``Grams.ends``), and of their exchange."""
    if not sums.any_shared:
        return 0
    ends = F64 * len(sums.layout.shapes) * 2 * k * sums.cols
    return ends + max(2 * exchanged_bytes(sums, k), ends)  # then they are counted on one rank each


def exchanged_bytes(sums: GramSums, k: int) -> float:
    """Bytes of the parts of split rows that this rank receives."""
    if not sums.any_shared:
        return 0
    places, _ = sums.shared
    return F64 * len(places) * k * sums.cols


def rows_of(batch: Batch, k: int) -> list[tuple[float, float]]:
    """For each group: bytes of its touched rows in fp32 (0: a view) and float64."""
    found: list[tuple[float, float]] = []
    for group in batch:
        elements = k * len(group.which) * group.rows * group.cols
        found.append((F32 * elements if group.head or group.tail else 0, F64 * elements))
    return found


def summed_bytes(batch: Batch, k: int, made: int, kept: int) -> float:
    """Peak of a batch of k columns in ``GramSums.__call__``.

    Args:
        made: bytes of an element while the columns are made.
        kept: bytes of an element afterwards.
    """
    elements, before, most = batch[-1].flat.stop, 0.0, 0.0
    for padded, rows in rows_of(batch, k):  # the rows of a group are freed after the next are there
        most, before = max(most, before + padded + rows), rows
    return max(made * elements, kept * elements + most)
