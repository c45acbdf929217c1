"""Computes leading singular triplets of a sharded matrix by randomised block Krylov iteration.

Halko, Martinsson & Tropp 2011 ("Finding structure with randomness") draw a random block and refine
it by powers of ``MᵀM``, with each product orthonormalised (Algorithm 4.4). They then take the SVD
of the small compressed matrix (Algorithm 5.1). The refinement here also keeps the earlier powers
(block Krylov iteration, Musco & Musco 2015, Algorithm 2). It restarts from the best vectors when
there are ``BLOCKS`` blocks. With the same number of products, this converges several times sooner
where the spectrum is flat. The sign matrices of LoRA-SB decided this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.core.flat_shard import FlatShard, Piece
from scalora_dist.core.layout import Layout

OVERSAMPLING = 8  # columns of a block beyond the rank
BLOCKS = 4  # blocks kept before a restart
MAX_STEPS = 60
# Converged: no wanted σ² grew by more than this fraction of itself in one step. Sign matrices
# converge slowest; less than 2e-5 of their energy is then still missing.
TOLERANCE = 1e-5
# For this test, a σ² below this fraction of the largest counts as that large: fp32 products do not
# resolve its growth.
SMALL = 1e-6
# Number of rows that are cast to the dtype of the products at a time.
CAST_ROWS = 1024


class TruncatedSVD(NamedTuple):
    """``M ≈ U diag(S) Vᵀ``: float64, full on every rank, on the matrix's device.

    Ranks with the same kind of processor have the same bits.
    """

    U: Tensor  # (m, rank), orthonormal columns; each one's largest entry in size is positive
    S: Tensor  # (rank,), descending
    V: Tensor  # (n, rank), orthonormal columns


def truncated_svd(
    matrix: FlatShard, rank: int, *, device: torch.device | str, seed: int = 0
) -> TruncatedSVD:
    """The leading singular triplets of a sharded matrix (m, n), which is never gathered.

    Collectives over ``matrix.group``: one all-gather of the ranges; in each step, all-reduces of
    (basis + split rows) × block float64, n × block float64 and one number; at the end, one
    all-reduce of m × rank float64. Here block = rank + OVERSAMPLING and basis ≤ BLOCKS blocks. None
    without a group. The small decompositions are computed on every rank.

    Args:
        matrix: shard of M, any float dtype; 16-bit is multiplied in float32, some rows at a time.
        rank: number of triplets, at most min(m, n). If M's own rank is lower, the σ beyond it are
            zero up to rounding, and U and V are completed to orthonormal columns.
        device: device of communication buffers (the accelerator with NCCL, the CPU with gloo).
        seed: seed of the random block, the same on every rank.

    Raises:
        ValueError: ``rank`` is not in 1 … min(m, n).
    """
    m, n = matrix.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank {rank} does not lie in 1 … {min(m, n)} of a {m} × {n} matrix")
    block = min(rank + OVERSAMPLING, n)

    # Drawn on the CPU, so that it is the same on every kind of device.
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(n, block, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(draw.to(matrix.local.device)).Q
    image = _Image(matrix, torch.device(device))
    image.append(basis)
    ritz, vectors = image.ritz()
    for _ in range(MAX_STEPS):
        if basis.shape[1] == n:  # the whole space: exact
            break
        before, best = ritz[:rank], vectors[:, :block]
        powers = image.transposed_times(best / _lengths(ritz[:block]))
        if basis.shape[1] == BLOCKS * block:
            basis = basis @ best
            image.rotate(best)
        # Householder's Q is orthonormal whatever the columns: parallel, zero, more than n.
        fresh = torch.linalg.qr(torch.cat([basis, powers], dim=1)).Q[:, basis.shape[1] :]
        basis = torch.cat([basis, fresh], dim=1)
        image.append(fresh)
        ritz, vectors = image.ritz()
        growth = ritz[:rank] - before
        converged = (growth <= TOLERANCE * ritz[:rank].clamp_min(SMALL * ritz[0])).all()
        if image.anywhere(converged):
            break

    leading = vectors[:, :rank]
    Q, R = torch.linalg.qr(image.whole(leading))  # M · (V leading), not yet orthonormal
    left, S, right = torch.linalg.svd(R)
    U, V = Q @ left, basis @ leading @ right.T
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    return TruncatedSVD(U * signs, S, V * signs)


def _lengths(ritz: Tensor) -> Tensor:
    """Norms of the image's columns. Division by them keeps fp32 products from under- or overflow.

    Args:
        ritz: squared norms (k,), descending; those beyond M's rank are rounding errors or zero.
    """
    limits = torch.finfo(torch.float64)
    return ritz.clamp_min(limits.eps * ritz[0] + limits.tiny).sqrt()


class _Image:
    """``Y = M · basis``, with rows sharded like M's, and ``YᵀY``, the same on every rank.

    Attributes:
        own: rows that lie on this rank only, (touched rows, k) float64; zero where a row is split.
        shared: rows that lie on several ranks, complete, (split rows, k) float64.
        gram: YᵀY, (k, k) float64.
    """

    def __init__(self, matrix: FlatShard, device: torch.device) -> None:
        self.matrix = matrix
        self.device = device
        self.working = torch.promote_types(matrix.local.dtype, torch.float32)
        n = matrix.shape[1]
        end = matrix.offset + matrix.local.numel()
        self.first = matrix.offset // n
        touched = ceil_div(end, n) - self.first if matrix.local.numel() else 0
        split = Layout.of([matrix], device).split[0].to(matrix.local.device)
        self.split = split
        # Which of the split rows this rank has a part of, and where they lie in ``own``.
        self.mine = (split >= self.first) & (split < self.first + touched)
        self.places = split[self.mine] - self.first
        self.own = self._zeros(touched, 0)
        self.shared = self._zeros(len(split), 0)
        self.gram = self._zeros(0, 0)

    def append(self, fresh: Tensor) -> None:
        """Add the image of new columns of the basis, (n, b) float64. One all-reduce."""
        own = self._zeros(len(self.own), fresh.shape[1])
        right = fresh.to(self.working)
        for rows, block, piece in self._blocks():
            own[rows] += block @ right[piece.cols]
        # No rank has all of a split row: its partial products are summed in slots of one buffer.
        slots = self._zeros(len(self.split), fresh.shape[1])
        slots[self.mine] = own[self.places]
        own[self.places] = 0
        self.own = torch.cat([self.own, own], dim=1)
        k = self.own.shape[1]
        border, slots = self._summed(torch.cat([self.own.T @ own, slots])).tensor_split([k])
        self.shared = torch.cat([self.shared, slots], dim=1)
        border = border + self.shared.T @ slots
        old = len(self.gram)
        self.gram = torch.cat([torch.cat([self.gram, border[:old]], dim=1), border.T])

    def rotate(self, vectors: Tensor) -> None:
        """Change the basis to ``basis @ vectors``, vectors (k, j) float64. No communication."""
        self.own, self.shared = self.own @ vectors, self.shared @ vectors
        self.gram = vectors.T @ self.gram @ vectors

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Estimates of σ² (k,), descending, and their vectors in the basis (k, k).

        No communication.
        """
        values, vectors = torch.linalg.eigh(self.gram)
        return values.flip(0).clamp_min(0), vectors.flip(1)

    def transposed_times(self, vectors: Tensor) -> Tensor:
        """``Mᵀ Y vectors``, (n, j) float64, the same on every rank. One all-reduce."""
        left = self.own @ vectors
        left[self.places] = self.shared[self.mine] @ vectors
        left = left.to(self.working)
        product = self._zeros(self.matrix.shape[1], vectors.shape[1])
        for rows, block, piece in self._blocks():
            product[piece.cols] += block.T @ left[rows]
        return self._summed(product)

    def whole(self, vectors: Tensor) -> Tensor:
        """``Y vectors``, (m, j) float64, all rows on every rank. One all-reduce."""
        rows = self._zeros(self.matrix.shape[0], vectors.shape[1])
        rows[self.first : self.first + len(self.own)] = self.own @ vectors
        rows = self._summed(rows)
        rows[self.split] = self.shared @ vectors
        return rows

    def anywhere(self, flag: Tensor) -> bool:
        """Whether ``flag`` is true on any rank: different processors may differ in the last bit."""
        return bool(self._summed(flag.double()) > 0)

    def _blocks(self) -> Iterator[tuple[slice, Tensor, Piece]]:
        """For each piece: (its rows in ``own``, its values in the products' dtype, the piece)."""
        for piece in self.matrix.pieces(CAST_ROWS):
            rows = slice(piece.rows.start - self.first, piece.rows.stop - self.first)
            yield rows, piece.block.to(self.working), piece

    def _summed(self, part: Tensor) -> Tensor:
        if self.matrix.group is None:
            return part
        message = part.to(self.device)
        dist.all_reduce(message, group=self.matrix.group)
        return message.to(part.device)

    def _zeros(self, rows: int, cols: int) -> Tensor:
        return torch.zeros(rows, cols, dtype=torch.float64, device=self.matrix.local.device)
