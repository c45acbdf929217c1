"""Keeps merges beside a frozen W as two tall factors C and D, and compresses them when full.

A merge of ``A diag(w) Bᵀ`` appends r columns to C and to D, without loss. When no columns are free,
C Dᵀ is compressed to rank R. This needs only the float64 grams of C and D (one all-reduce).

With ``CᵀC = V_C S_C V_Cᵀ`` and ``DᵀD = V_D S_D V_Dᵀ``, the singular values of C Dᵀ are those of the
small matrix ``S_C^½ V_Cᵀ V_D S_D^½``. The compressed factors are C and D times small matrices.
The grams are factored by eigh, not by Cholesky: merged columns are nearly parallel, and the columns
of the first merge are zero.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalora_dist.core import host
from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.grams import GramSums
from scalora_dist.core.layout import Batch, Layout
from scalora_dist.core.split_precision import join_halves, split_halves, zero_low_half
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.layers.carry_linear import CarryLinear
from scalora_dist.methods.merger import MergeTarget
from scalora_dist.profiling.clock import Clock

logger = logging.getLogger(__name__)

# Eigenvalues of a (K, K) gram below NOISE · K times the largest one are rounding errors.
NOISE = 1e-15


class Compression(NamedTuple):
    """The matrices that compress C (m, K) and D (n, K) to at most ``kept`` nonzero columns.

    Attributes:
        on_C: (K, K) float64 matrix, applied as ``C ← C on_C``.
        on_D: (K, K) float64 matrix, applied as ``D ← D on_D``.
        kept: number of columns that are not zero afterwards.
        lost: Frobenius norm ‖C Dᵀ − (C on_C)(D on_D)ᵀ‖, plus an estimate of the rounding to fp32.
        norm: Frobenius norm ‖C Dᵀ‖ before the compression.
    """

    on_C: Tensor
    on_D: Tensor
    kept: int
    lost: float
    norm: float


class Carry(MergeTarget):
    """The carries C and D of all layers. Each rank stores and writes only its own shards."""

    def __init__(
        self,
        layers: Sequence[LayerShards],
        modules: Mapping[str, CarryLinear],
        world: World,
        *,
        rank: int,
        limit: float,
    ) -> None:
        """Exchange which rank holds which range (one all-gather).

        Args:
            layers: the layers, in the same order as in every later call.
            modules: the module of each layer, by layer name.
            rank: R, the rank that a full carry is compressed to.
            limit: largest share of a layer's update that may be lost before a warning (0 to 1).
        """
        self.modules = modules
        self.world = world
        self.rank = rank
        self.limit = limit
        self.layout = Layout.of(_shards(layers), world.device)
        self.keys = [f"{layer.name}.{key}" for layer in layers for key in "CD"]
        self.low_halves: dict[str, Tensor] = {
            f"{layer.name}.{key}": zero_low_half(shard)
            for layer in layers
            for key, shard in zip("CD", _carry(layer), strict=True)
            if shard.local.dtype != torch.float32
        }
        self.lost = dict.fromkeys((layer.name for layer in layers), 0.0)  # summed over compressions
        self.shares: dict[str, float] = {}  # lost / norm, as of the last compression
        self.compressed: dict[str, int] = {}  # columns kept, since the last report
        self.warned = False

    def make_room(self, layers: Sequence[LayerShards], which: Sequence[int], clock: Clock) -> None:
        columns = layers[0].A.shape[1]
        full = [
            i
            for i in which
            if self.modules[layers[i].name].used + columns > _carry(layers[i])[0].shape[1]
        ]
        if full:
            clock.begin("room")
            self.compress(layers, full)

    def factor(self, layer: LayerShards) -> float:
        return 1.0  # the layer's forward multiplies C Dᵀ by s

    def add(self, layer: LayerShards, left: Tensor, right: Tensor) -> None:
        module = self.modules[layer.name]
        columns = slice(module.used, module.used + left.shape[1])
        # Give each column the same length in C and in D: fp16 has few digits for small numbers.
        # Factors are powers of two, so the scaling itself does not round.
        ratio = (right.norm(dim=0) / left.norm(dim=0)).sqrt().log2().round().exp2()
        balance = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
        left, right = left * balance, right / balance
        for key, shard, values in zip("CD", _carry(layer), (left, right), strict=True):
            self._write_columns(f"{layer.name}.{key}", shard, columns, values)
        module.used = columns.stop

    def finish(self, layers: Sequence[LayerShards]) -> None:
        """Compress every carry with more than R columns, so that it fits a rank R + r adapter."""
        which = [i for i, x in enumerate(layers) if self.modules[x.name].used > self.rank]
        self.compress(layers, which)

    @torch.no_grad()
    def compress(self, layers: Sequence[LayerShards], which: Sequence[int]) -> None:
        """Compress the carries of the layers ``which`` to rank R.

        Per bucket of layers: one all-reduce of grams, one message with the solutions and one host
        synchronisation.
        """
        carries, numbers = _shards(layers), []
        for bucket in self.layout.buckets([(2 * i, 2 * i + 1) for i in which]):
            shards = [carries[j] for j in bucket]
            lows = [
                shard.like(self.low_halves[self.keys[j]])
                for j, shard in zip(bucket, shards, strict=True)
                if self.low_halves
            ]
            sums = GramSums(self.layout.only(bucket))
            columns = partial(_packed, sums.layout, shards, lows)
            grams = sums(columns, 1)
            mixes, found = self._solve(grams.sums)
            for batch, mixed in sums.mixed(columns, grams, mixes):
                _unpack(sums.layout, shards, lows, batch, mixed.float())
            numbers.append(found)
        if numbers:
            host.on_host(partial(self._note, [layers[i].name for i in which]), torch.cat(numbers))
        self._warn()

    def _note(self, names: Sequence[str], numbers: Tensor) -> None:
        """Take [columns kept, norm lost, norm before] of each layer's compression into account."""
        for name, (kept, lost, norm) in zip(names, numbers.tolist(), strict=True):
            self.modules[name].used = self.compressed[name] = int(kept)
            self.lost[name] += lost
            self.shares[name] = self.lost[name] / norm if norm else 0.0

    def _solve(self, grams: Tensor) -> tuple[Tensor, Tensor]:
        """Solve this rank's share of the layers, then exchange the solutions: one collective.

        Args:
            grams: CᵀC and DᵀD of each layer in turn, (2·layers, K, K) float64.

        Returns:
            on_C and on_D of each layer in turn, (2·layers, K, K), and the numbers of each layer's
            ``Compression``, (layers, 3); float64 on the device.
        """
        layers, K = len(grams) // 2, grams.shape[-1]
        share = ceil_div(layers, self.world.size)
        rows = host.on_host(partial(self._solve_share, share), grams)
        table = self.world.gather_table(rows, layers)
        # Copies, so that no bucket's table is kept until the last bucket is done.
        return table[:, : 2 * K * K].reshape(-1, K, K), table[:, 2 * K * K :].clone()

    def _solve_share(self, share: int, grams: Tensor) -> Tensor:
        """This rank's rows of the table of on_C, on_D and numbers: (share, 2·K² + 3)."""
        pairs, K = grams.unflatten(0, (-1, 2)), grams.shape[-1]
        mine = pairs[self.world.rank * share : (self.world.rank + 1) * share]
        rows = torch.zeros(share, 2 * K * K + 3, dtype=torch.float64)
        for row, (gram_c, gram_d) in zip(rows, mine, strict=False):
            done = compression(gram_c, gram_d, self.rank)
            numbers = torch.tensor([done.kept, done.lost, done.norm], dtype=torch.float64)
            row.copy_(torch.cat([done.on_C.flatten(), done.on_D.flatten(), numbers]))
        return rows

    def _write_columns(self, key: str, shard: FlatShard, columns: slice, values: Tensor) -> None:
        """Set ``M[:, columns]`` on this rank's range. ``values``: (all rows, columns) float32."""
        values = values.to(shard.local.device)
        low = self.low_halves.get(key)
        for piece in shard.pieces():
            first = max(columns.start, piece.cols.start)
            end = min(columns.stop, piece.cols.stop)
            if first >= end:
                continue
            here = slice(first - piece.cols.start, end - piece.cols.start)
            part = values[piece.rows, first - columns.start : end - columns.start].contiguous()
            if low is None:
                piece.block[:, here] = part
            else:
                high, rest = split_halves(part, shard.local.dtype)
                piece.block[:, here] = high
                low[piece.flat].view_as(piece.block)[:, here] = rest

    def _warn(self) -> None:
        if self.warned or not self.shares:
            return
        worst = max(self.shares, key=lambda name: self.shares[name])
        if self.shares[worst] > self.limit:
            self.warned = True
            logger.warning(
                "the carry of %s has lost %.1f %% of its update (carry_limit: %.1f %%): "
                "set a --carry_rank above %d",
                worst,
                100 * self.shares[worst],
                100 * self.limit,
                self.rank,
            )

    def report(self) -> dict[str, Any]:
        """Columns kept and a bound on the loss, for compressions since the last report.

        The bound of a layer is a quotient of norms. The numerator is the sum of what all its
        compressions lost. The denominator is the norm of its carry before the last compression.
        """
        kept, self.compressed = self.compressed, {}
        if not kept:
            return {}
        lost = {name: self.shares[name] for name in kept}
        return {
            "compressed": len(kept),
            "rank_max": max(kept.values()),
            "rank_mean": sum(kept.values()) / len(kept),
            "lost_max": max(lost.values()),
            "lost": lost,
        }

    def summary(self) -> dict[str, Any]:
        used = [module.used for module in self.modules.values()]
        return {
            "columns": [min(used), sum(used) / len(used), max(used)],
            "lost_max": max(self.shares.values(), default=0.0),
        }

    def state(self) -> dict[str, Any]:
        used = {name: module.used for name, module in self.modules.items()}
        # Copies, because a checkpoint is written while training continues.
        lost, shares = dict(self.lost), dict(self.shares)
        return {"used": used, "lost": lost, "shares": shares, "warned": self.warned}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, used in state["used"].items():
            self.modules[name].used = int(used)
        self.lost, self.shares = dict(state["lost"]), dict(state["shares"])
        self.warned = bool(state["warned"])


def compression(gram_c: Tensor, gram_d: Tensor, rank: int) -> Compression:
    """The best rank-``rank`` approximation of C Dᵀ, from CᵀC and DᵀD, each (K, K) float64."""
    norm_square = float((gram_c * gram_d).sum())
    on_c, on_d = torch.zeros_like(gram_c), torch.zeros_like(gram_d)
    if norm_square <= 0:
        return Compression(on_c, on_d, 0, 0.0, 0.0)
    # Rescale columns so that each is as long in D as in C, with the same C Dᵀ. Then a column that
    # is small in one is small in both.
    lengths_c, lengths_d = gram_c.diagonal().sqrt(), gram_d.diagonal().sqrt()
    alive = (lengths_c > 0) & (lengths_d > 0)
    balance = torch.where(alive, (lengths_d / lengths_c).sqrt(), 1.0)
    balance[~alive] = 0
    back = torch.where(alive, 1 / balance, 0.0)
    gram_c, gram_d = balance[:, None] * gram_c * balance, back[:, None] * gram_d * back
    (root_c, pinv_c), (root_d, pinv_d) = _roots(gram_c), _roots(gram_d)
    left, sigma, right = torch.linalg.svd(root_c.T @ root_d)
    # Drop singular values that rounding to fp32 would lose anyway: they would waste columns.
    kept = min(rank, int((sigma > 2**-26 * sigma[0]).sum()))
    roots = sigma[:kept].sqrt()
    X, Y = pinv_c @ left[:, :kept] * roots, pinv_d @ right[:kept].T * roots
    on_c[:, :kept], on_d[:, :kept] = balance[:, None] * X, back[:, None] * Y
    rest = torch.eye(len(gram_c), dtype=gram_c.dtype) - X @ Y.T
    truncated = float(((gram_c @ rest) * (rest @ gram_d)).sum().clamp_min(0).sqrt())
    rounded = 2**-23 * float((sigma[0] * sigma[:kept].sum()).sqrt())
    return Compression(on_c, on_d, kept, truncated + rounded, norm_square**0.5)


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(F, F⁺ᵀ), each (K, K), with ``gram = F Fᵀ``. Eigenvalues below the noise count as zero."""
    values, vectors = torch.linalg.eigh(gram)
    alive = values > NOISE * len(gram) * values[-1]
    roots = torch.where(alive, values.clamp_min(0).sqrt(), 0.0)
    inverse = torch.where(alive, 1 / roots, 0.0)
    return vectors * roots, vectors * inverse


def _packed(
    layout: Layout, shards: Sequence[FlatShard], lows: Sequence[FlatShard], batch: Batch
) -> Tensor:
    """A batch of carries in fp32, (1, elements).

    Args:
        lows: the low halves of 16-bit carries; empty for others.
    """
    values = layout.pack(batch, shards)
    return (join_halves(values, layout.pack(batch, lows)) if lows else values)[None]


def _unpack(
    layout: Layout,
    shards: Sequence[FlatShard],
    lows: Sequence[FlatShard],
    batch: Batch,
    values: Tensor,
) -> None:
    """The inverse of ``_packed``: ``values`` (elements,) float32."""
    if lows:
        values, rest = split_halves(values, shards[0].local.dtype)
        layout.unpack(batch, (values, shards), (rest, lows))
    else:
        layout.unpack(batch, (values, shards))


def _carry(layer: LayerShards) -> tuple[FlatShard, FlatShard]:
    assert layer.carry is not None
    return layer.carry


def _shards(layers: Sequence[LayerShards]) -> list[FlatShard]:
    """C and D of each layer in turn."""
    return [shard for layer in layers for shard in _carry(layer)]
