"""Estimates the spectrum of a weight's accumulated update during training, from a random sketch.

Δ = (all merges so far) + s·A Bᵀ of a weight (m, n) is never formed, and the initial W is not kept.
Instead, two products with Gaussian test matrices Ω (n, k) and Ψ (m, l), l = 2k + 1, are kept:

    Y = Δ Ω   (m, k): its columns span the range of Δ
    Z = Δᵀ Ψ  (n, l): the action of Δ inside that range

Both are linear in Δ, so a merge ``Δ += A diag(w) Bᵀ`` adds ``A diag(w) (Bᵀ Ω)`` to Y and
``B diag(w) (Aᵀ Ψ)`` to Z. If Q is an orthonormal basis of Y's columns, Δ ≈ Q (Ψᵀ Q)⁺ Zᵀ. This is
Algorithm 4 of Tropp, Yurtsever, Udell & Cevher (arXiv 1609.00048, "Practical sketching algorithms
for low-rank matrix approximation"). They choose l = 2k + 1 for a spectrum with unknown decay.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.layout import Layout

# Singular values above this fraction of the largest count towards the rank.
RELATIVE_THRESHOLD = 1e-3
LEADING = 4  # number of reported singular values
# From this fraction of the sketch's width on, a rank is only a lower bound: part of a smoothly
# decaying spectrum lies outside the sketch, and too few singular values are counted.
TRUSTED = 0.9
# Directions of Y below this fraction of its largest are float32 rounding errors. It is far below
# RELATIVE_THRESHOLD. Its square, for eigenvalues of YᵀY, is well above float64's rounding errors.
NOISE = 1e-6

Factors = Sequence[tuple[FlatShard, FlatShard]]


@dataclass(frozen=True)
class Spectrum:
    """Numerical rank and largest singular values of one layer's update.

    Attributes:
        rank: number of singular values above ``RELATIVE_THRESHOLD`` times the largest; 0 for no
            update.
        full: whether the sketch is (nearly) full, so ``rank`` is a lower bound: show "≥ rank".
        values: the largest singular values, at most ``LEADING``, descending; NaN (and rank 0) for
            an update that is not finite.
    """

    rank: int
    full: bool
    values: tuple[float, ...]


@dataclass(frozen=True)
class _Side:
    """Sketch data of one factor of one layer: A has Ψ and Y, B has Ω and Z.

    Attributes:
        first: index of the first row of the factor that this rank touches.
        probe: rows of the test matrix, (touched rows, l for A or k for B) float32.
        sketch: shard of Y (m, k) or Z (n, l): the rows that this rank owns, float32.
        slots: indices, in ``Layout.split``, of the split rows that this rank touches, int64.
        places: indices of the same rows among this rank's touched rows, int64.
    """

    first: int
    probe: Tensor
    sketch: FlatShard
    slots: Tensor
    places: Tensor

    @property
    def rows(self) -> Tensor:
        """View of the sketch, (owned rows, width)."""
        return self.sketch.local.view(-1, self.sketch.shape[1])

    def owned(self, touched: Tensor) -> Tensor:
        """The touched rows that this rank owns: all but a first row that begins on another rank."""
        return touched[self.sketch.offset // self.sketch.shape[1] - self.first :]


class RankSketch:
    """Y and Z of some layers. The rank that holds the beginning of a factor row owns their row.

    So Y and Z are ``FlatShard``s of full rows over the factors' group (None: full on every rank),
    and a checkpoint reshards them like other tensors. Test matrices are not saved but drawn again.

    Memory: Y, Z, Ω and Ψ take 4 (m + n)(3k + 1) bytes per layer, divided by the group's size. That
    is 12.6 MB for 4096 × 4096 at k = 128.
    """

    def __init__(
        self,
        names: Sequence[str],
        factors: Factors,
        device: torch.device,
        *,
        width: int = 128,
        seed: int,
    ) -> None:
        """Exchange the factors' ranges (one all-gather) and draw the test matrices layer by layer.

        Args:
            names: names of the layers. A resumed run needs the same names, ``width`` and ``seed``.
            factors: (A, B) of each layer, (m, r) and (n, r) float32, with one group and one r.
                Later calls use the same order. The sketches are on the factors' device.
            device: device of the communication buffers.
            width: k, reduced to min(m, n) where that is smaller. Ranks up to ``TRUSTED`` · k can
                be measured.
            seed: seed of the test matrices, from 0 to 2³² - 1.
        """
        self.names = list(names)
        self.layout = Layout.of([factor for pair in factors for factor in pair], device)
        splits = zip(self.layout.split[0::2], self.layout.split[1::2], strict=True)
        self.layers = [
            _sides(name, pair, split, width, seed)
            for name, pair, split in zip(names, factors, splits, strict=True)
        ]

    @torch.no_grad()
    def add(self, factors: Factors, weights: Tensor) -> None:
        """Record a merge ``Δ += A diag(weights[i]) Bᵀ`` of each layer i. One all-reduce for all.

        Args:
            factors: A and B as they are merged, before a rescale or a reset changes them.
            weights: weight of each column, (layers, r), any float dtype.
        """
        for sides, lefts, rights in self._products(factors, weights):
            for side, left, right in zip(sides, lefts, rights, strict=True):
                side.rows.addmm_(left, right)

    @torch.no_grad()
    def read(self, factors: Factors, scalings: Sequence[float]) -> list[Spectrum]:
        """Each layer's spectrum, the present s·A Bᵀ included, the same on every rank of the group.

        One all-reduce of k² + k l + l² float64 (0.9 MB at k = 128) per layer, and two for all
        layers together. The layers' decompositions are divided among the ranks.

        Args:
            factors: the present A and B of each layer.
            scalings: s of each layer.
        """
        group = self.layout.group
        turns, turn = (dist.get_world_size(group), dist.get_rank(group)) if group else (1, 0)
        found = torch.zeros(len(self.layers), 1 + LEADING, dtype=torch.float64)
        for i, grams in enumerate(self._grams(factors, scalings)):
            if i % turns == turn:
                values = singular_values(*(gram.cpu() for gram in grams))
                found[i, 0] = (values > RELATIVE_THRESHOLD * values[0]).sum()
                found[i, 1:][: len(values)] = values[:LEADING]
        if group is not None:
            found = found.to(self.layout.device)
            dist.all_reduce(found, group=group)
        return [
            _spectrum(int(rank), values, sides)
            for (rank, *values), sides in zip(found.tolist(), self.layers, strict=True)
        ]

    def shards(self) -> dict[str, FlatShard]:
        """{name: Y or Z}: the shards that a checkpoint saves, and loads in place."""
        return {
            f"{name}.sketch.{letter}": side.sketch
            for name, sides in zip(self.names, self.layers, strict=True)
            for letter, side in zip("YZ", sides, strict=True)
        }

    def _grams(self, factors: Factors, scalings: Sequence[float]) -> Iterator[list[Tensor]]:
        """Per layer YᵀY (k, k), ΨᵀY (l, k) and ZᵀZ (l, l), float64, with s·A Bᵀ included."""
        weights = torch.tensor(scalings)[:, None].expand(-1, factors[0][0].shape[1])
        for sides, lefts, rights in self._products(factors, weights):
            y, z = (
                side.rows.double() + left.double() @ right.double()
                for side, left, right in zip(sides, lefts, rights, strict=True)
            )
            psi = sides[0].owned(sides[0].probe).double()
            blocks = [y.T @ y, psi.T @ y, z.T @ z]
            message = torch.cat([block.flatten() for block in blocks]).to(self.layout.device)
            if self.layout.group is not None:
                dist.all_reduce(message, group=self.layout.group)
            sums = message.split([block.numel() for block in blocks])
            yield [total.view_as(block) for total, block in zip(sums, blocks, strict=True)]

    def _products(
        self, factors: Factors, weights: Tensor
    ) -> Iterator[tuple[tuple[_Side, _Side], list[Tensor], list[Tensor]]]:
        """What ``Δ += A diag(weights) Bᵀ`` adds to each layer's Y and Z, as ``left @ right``.

        A factor row that lies on two ranks has one owner, which needs the complete row. Each rank
        writes its part into a slot of one buffer. One all-reduce.

        Yields:
            (sides of the layer, lefts, rights), all float32. The lefts are A diag(w) and B diag(w),
            (owned rows, r) each. The rights are BᵀΩ (r, k) and AᵀΨ (r, l).
        """
        sides = [side for pair in self.layers for side in pair]
        touched = [factor.padded_rows()[1] for pair in factors for factor in pair]
        widths = [side.probe.shape[1] for side in sides]
        heights = [w + len(split) for w, split in zip(widths, self.layout.split, strict=True)]
        message = torch.zeros(sum(heights), touched[0].shape[1], device=self.layout.device)
        for part, width, side, rows in zip(
            message.split(heights), widths, sides, touched, strict=True
        ):
            part[:width] = side.probe.T @ rows
            part[width:][side.slots] = rows[side.places].to(part)
        if self.layout.group is not None:
            dist.all_reduce(message, group=self.layout.group)
        parts = message.to(touched[0].device).split(heights)
        weights = weights.to(touched[0])
        rights, lefts = [], []
        for i, (part, width, side, rows) in enumerate(
            zip(parts, widths, sides, touched, strict=True)
        ):
            # Split rows occur only where ``padded_rows`` copied: the factor does not change.
            rows[side.places] = part[width:][side.slots]
            lefts.append(side.owned(rows) * weights[i // 2])
            rights.append(part[:width].T)
        for i, pair in enumerate(self.layers):
            a, b = 2 * i, 2 * i + 1
            yield pair, [lefts[a], lefts[b]], [rights[b], rights[a]]


def _spectrum(rank: int, values: list[float], sides: tuple[_Side, _Side]) -> Spectrum:
    (m, k), (n, _) = (side.sketch.shape for side in sides)
    # A sketch as wide as the matrix captures the full spectrum.
    full = k < min(m, n) and rank >= TRUSTED * k
    return Spectrum(rank, full, tuple(values[:k]))


def _sides(
    name: str,
    factors: tuple[FlatShard, FlatShard],
    splits: tuple[Tensor, Tensor],
    width: int,
    seed: int,
) -> tuple[_Side, _Side]:
    """Zero sketches and test matrices of one layer; the sharding does not change their values."""
    k = min(width, *(factor.shape[0] for factor in factors))
    # A resumed run must draw the test matrices that its Y and Z were made with. numpy guarantees
    # the numbers of this old generator; torch's may change with the version or the processor.
    random = np.random.RandomState([seed, zlib.crc32(name.encode())])

    def side(factor: FlatShard, split: Tensor, columns: int, probes: int) -> _Side:
        (height, rank), device = factor.shape, factor.local.device
        first, rows = factor.padded_rows()
        whole = random.standard_normal((height, probes))
        probe = torch.from_numpy(whole[first : first + len(rows)].astype(np.float32))
        start, end = (
            ceil_div(at, rank) for at in (factor.offset, factor.offset + len(factor.local))
        )
        sketch = torch.zeros((end - start) * columns, device=device)
        slots = ((split >= first) & (split < first + len(rows))).nonzero()[:, 0]
        return _Side(
            first,
            probe.to(device),
            FlatShard(sketch, start * columns, (height, columns), factor.group),
            slots.to(device),
            (split[slots] - first).to(device),
        )

    a, b = factors
    return side(a, splits[0], k, 2 * k + 1), side(b, splits[1], 2 * k + 1, k)


def singular_values(gram_y: Tensor, cross: Tensor, gram_z: Tensor) -> Tensor:
    """Singular values of Q (Ψᵀ Q)⁺ Zᵀ, Q an orthonormal basis of Y: (k,), descending.

    Grams square the singular values, so relative singular values below 1e-8 are lost in float64.
    That is five orders of magnitude below ``RELATIVE_THRESHOLD``.

    Args:
        gram_y: YᵀY (k, k), float64 on the CPU.
        cross: ΨᵀY (l, k), likewise.
        gram_z: ZᵀZ (l, l), likewise.
    """
    values = torch.zeros(len(gram_y), dtype=torch.float64)
    if not all(bool(block.isfinite().all()) for block in (gram_y, cross, gram_z)):
        return values.fill_(torch.nan)
    squares, vectors = torch.linalg.eigh(gram_y)
    if squares[-1] <= 0:
        return values
    kept = squares > NOISE**2 * squares[-1]
    basis = vectors[:, kept] / squares[kept].sqrt()  # Q = Y basis
    core = torch.linalg.pinv(cross @ basis)  # (ΨᵀQ)⁺, well conditioned: l is twice k
    found = torch.linalg.eigvalsh(core @ gram_z @ core.T).clamp(min=0).sqrt().flip(0)
    values[: len(found)] = found
    return values


def numerical_rank(matrix: Tensor) -> int:
    """Number of singular values above ``RELATIVE_THRESHOLD`` times the largest; 0 for zeros."""
    values = torch.linalg.svdvals(matrix)
    return int((values > RELATIVE_THRESHOLD * values[0]).sum()) if values[0] > 0 else 0
