"""The spectrum of the accumulated update of a weight while a run goes on, from a random sketch.

Δ = (all merges so far) + s·A Bᵀ of a weight (m, n) is never formed and no initial W is kept. Two
products with Gaussian test matrices are, Ω (n, k) and Ψ (m, l), l = 2k + 1:

    Y = Δ Ω   (m, k): its columns span Δ's range
    Z = Δᵀ Ψ  (n, l): what Δ does inside that range

Both are linear in Δ, so a merge ``Δ += A diag(w) Bᵀ`` adds ``A diag(w) (Bᵀ Ω)`` to Y and
``B diag(w) (Aᵀ Ψ)`` to Z. With Q an orthonormal basis of Y, Δ ≈ Q (Ψᵀ Q)⁺ Zᵀ: Algorithm 4 of Tropp,
Yurtsever, Udell & Cevher (arXiv 1609.00048, "Practical sketching algorithms for low-rank matrix
approximation"); l = 2k + 1 is their choice for a spectrum whose decay is not known.
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
from scalora_dist.core.flat_shard import FlatShard, Layout

# A singular value counts from this share of the largest on.
RELATIVE_THRESHOLD = 1e-3
LEADING = 4  # how many singular values are reported
# From this share of the sketch's width on, a smoothly decaying spectrum leaks past the sketch and
# fewer singular values are counted than there are.
TRUSTED = 0.9
# Directions of Y below this share of its largest are float32 rounding, and far below what counts.
# Its square, as an eigenvalue of YᵀY, is still well above float64's.
NOISE = 1e-6

Factors = Sequence[tuple[FlatShard, FlatShard]]


@dataclass(frozen=True)
class Spectrum:
    """Of one layer's update.

    Attributes:
        rank: singular values above ``RELATIVE_THRESHOLD`` of the largest; 0 for no update.
        full: the sketch is (nearly) used up, so that ``rank`` is a lower bound: show "≥ rank".
        values: the largest singular values, at most ``LEADING``, descending; NaN (and rank 0) for
            an update that is not finite.
    """

    rank: int
    full: bool
    values: tuple[float, ...]


@dataclass(frozen=True)
class _Side:
    """What belongs to one factor of one layer: A has Ψ and Y, B has Ω and Z.

    Attributes:
        first: the first row of the factor that this rank touches.
        probe: (touched rows, l for A or k for B) float32, the rows of the test matrix.
        sketch: the rows of Y (m, k) or Z (n, l) that this rank owns, float32.
        slots: which of the factor's split rows (``Layout.split``) this rank touches, int64.
        places: where these are among its touched rows, int64.
    """

    first: int
    probe: Tensor
    sketch: FlatShard
    slots: Tensor
    places: Tensor

    @property
    def rows(self) -> Tensor:
        """The sketch as (owned rows, width), a view."""
        return self.sketch.local.view(-1, self.sketch.shape[1])

    def owned(self, touched: Tensor) -> Tensor:
        """This rank's own rows of its touched ones: all but a first row that begins elsewhere."""
        return touched[self.sketch.offset // self.sketch.shape[1] - self.first :]


class RankSketch:
    """Y and Z of some layers, each row of them on the rank that holds its factor row's beginning.

    So they are ``FlatShard``s of whole rows over the factors' group (None: whole on every rank),
    and a checkpoint reshards them like everything else. Test matrices are drawn again instead.

    Memory: Y, Z, Ω and Ψ take 4 (m + n)(3k + 1) bytes a layer, over the group's size: 12.6 MB for
    4096 × 4096 at k = 128.
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
        """Exchange who holds what (one all-gather) and draw the test matrices, a layer at a time.

        Args:
            names: of the layers. A resumed run needs the same name, ``width`` and ``seed``.
            factors: (A, B) of each layer, (m, r) and (n, r) float32, of one group and one r, in
                the order of every later call. Sketches live where they do.
            width: k, at most min(m, n); ranks up to ``TRUSTED`` of it can be told.
            seed: of the test matrices, from 0 to 2³² - 1.
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
        """A merge, ``Δ += A diag(weights[i]) Bᵀ`` in each layer i: one all-reduce for all layers.

        Args:
            factors: as they are merged, before a rescale or a reset of A and B.
            weights: (layers, r), any float dtype.
        """
        for sides, lefts, rights in self._products(factors, weights):
            for side, left, right in zip(sides, lefts, rights, strict=True):
                side.rows.addmm_(left, right)

    @torch.no_grad()
    def read(self, factors: Factors, scalings: Sequence[float]) -> list[Spectrum]:
        """Each layer's spectrum, the present s·A Bᵀ included, the same on every rank of the group.

        One all-reduce of k² + k l + l² float64 (0.9 MB at k = 128) a layer, and two for all layers.
        The ranks take turns with the decompositions.
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
        """{name: Y or Z}: what a checkpoint saves, and what it is to be loaded into."""
        return {
            f"{name}.sketch.{letter}": side.sketch
            for name, sides in zip(self.names, self.layers, strict=True)
            for letter, side in zip("YZ", sides, strict=True)
        }

    def _grams(self, factors: Factors, scalings: Sequence[float]) -> Iterator[list[Tensor]]:
        """Per layer YᵀY (k, k), ΨᵀY (l, k) and ZᵀZ (l, l), float64, with s·A Bᵀ added."""
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

        A row of a factor that lies on two ranks has one owner, who needs it whole: as in
        ``Layout.grams``, each writes its part into a slot of the one message.

        Yields:
            the layer's sides; lefts: A diag(w) and B diag(w), (owned rows, r) each; rights: BᵀΩ
            (r, k) and AᵀΨ (r, l). All float32.
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
            # A range with part rows was padded, that is copied: the factor stays as it is.
            rows[side.places] = part[width:][side.slots]
            lefts.append(side.owned(rows) * weights[i // 2])
            rights.append(part[:width].T)
        for i, pair in enumerate(self.layers):
            a, b = 2 * i, 2 * i + 1
            yield pair, [lefts[a], lefts[b]], [rights[b], rights[a]]


def _spectrum(rank: int, values: list[float], sides: tuple[_Side, _Side]) -> Spectrum:
    (m, k), (n, _) = (side.sketch.shape for side in sides)
    # A sketch as wide as the matrix misses nothing.
    full = k < min(m, n) and rank >= TRUSTED * k
    return Spectrum(rank, full, tuple(values[:k]))


def _sides(
    name: str,
    factors: tuple[FlatShard, FlatShard],
    splits: tuple[Tensor, Tensor],
    width: int,
    seed: int,
) -> tuple[_Side, _Side]:
    """Zero sketches of one layer and its test matrices, the same however the factors are cut."""
    k = min(width, *(factor.shape[0] for factor in factors))
    # numpy promises that this old generator's numbers stay; torch's may change with a version or
    # a processor, and a resumed run must draw the ones that its Y and Z were made with.
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

    Args:
        gram_y: YᵀY (k, k), cross: ΨᵀY (l, k), gram_z: ZᵀZ (l, l), all float64 on the CPU.

    Grams square what they are made of: relative singular values below 1e-8 are lost in float64,
    five orders of magnitude under ``RELATIVE_THRESHOLD``.
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
    """Singular values above ``RELATIVE_THRESHOLD`` of the largest; 0 for a zero matrix."""
    values = torch.linalg.svdvals(matrix)
    return int((values > RELATIVE_THRESHOLD * values[0]).sum()) if values[0] > 0 else 0
