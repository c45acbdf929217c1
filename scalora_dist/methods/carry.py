"""The carry: what was merged beside a frozen W, as two thin factors that are compressed when full.

A merge of ``A diag(w) Bᵀ`` is r more columns of C and D, with no loss. When there is no room for
them C Dᵀ is compressed to rank R, from float64 grams of C and D alone (one all-reduce): with
``CᵀC = V S Vᵀ`` and ``DᵀD`` likewise, the singular values of C Dᵀ are those of the small
``S_C^½ V_Cᵀ V_D S_D^½``, and its factors are C and D times small matrices. eigh and not Cholesky:
merged columns are nearly parallel, and those of the first merge are zero.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.core.flat_shard import FlatShard, Layout, mixed_rows
from scalora_dist.core.split_precision import join_halves, split_halves, zero_low_half
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.layers.carry_linear import CarryLinear
from scalora_dist.methods.merge_target import MergeTarget
from scalora_dist.profiling.clock import Clock

logger = logging.getLogger(__name__)

# An eigenvalue of a gram below this share of its largest, times K, is rounding of the products.
NOISE = 1e-15


class Compression(NamedTuple):
    """How C and D (…, K) become (…, K) with no more than ``kept`` columns that are not zero.

    Attributes:
        on_C, on_D: (K, K) float64: ``C ← C on_C`` and ``D ← D on_D``.
        kept: columns.
        lost: ‖C Dᵀ − (C on_C)(D on_D)ᵀ‖ in Frobenius' norm, rounding to fp32 included.
        norm: ‖C Dᵀ‖ before.
    """

    on_C: Tensor
    on_D: Tensor
    kept: int
    lost: float
    norm: float


class Carry(MergeTarget):
    """The carries of all layers of a model, on each rank's own rows."""

    def __init__(
        self,
        layers: Sequence[LayerShards],
        modules: Mapping[str, CarryLinear],
        world: World,
        *,
        rank: int,
        limit: float,
    ) -> None:
        """Exchange who holds what (one all-gather); ``layers`` in the order of every later call.

        Args:
            rank: R, which a full carry is compressed to.
            limit: of the lost share of a layer's update, past which a warning is given.
        """
        self.modules = modules
        self.world = world
        self.rank = rank
        self.limit = limit
        self.layout = Layout.of(_shards(layers), world.device)
        self.low_halves: dict[str, Tensor] = {
            f"{layer.name}.{key}": zero_low_half(shard)
            for layer in layers
            for key, shard in zip("CD", _carry(layer), strict=True)
            if shard.local.dtype != torch.float32
        }
        self.lost = dict.fromkeys((layer.name for layer in layers), 0.0)  # summed over compressions
        self.shares: dict[str, float] = {}  # of the update, at each layer's last compression
        self.compressed: dict[str, int] = {}  # layers, since the last report: columns kept
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

    def add(self, layer: LayerShards, left: Tensor, right: Tensor) -> None:
        module = self.modules[layer.name]
        columns = slice(module.used, module.used + left.shape[1])
        # Columns as long in C as in D, by powers of two, which round nothing: fp16 has no digits
        # for small numbers.
        ratio = (right.norm(dim=0) / left.norm(dim=0)).sqrt().log2().round().exp2()
        balance = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
        left, right = left * balance, right / balance
        for key, shard, values in zip("CD", _carry(layer), (left, right), strict=True):
            self._write_columns(f"{layer.name}.{key}", shard, columns, values)
        module.used = columns.stop

    def finish(self, layers: Sequence[LayerShards]) -> None:
        """Compress what has more than R columns: an adapter of rank R + r is to hold it."""
        which = [i for i, x in enumerate(layers) if self.modules[x.name].used > self.rank]
        self.compress(layers, which)

    @torch.no_grad()
    def compress(self, layers: Sequence[LayerShards], which: Sequence[int]) -> None:
        """Compress the carries of the layers ``which`` to rank R: an all-reduce per bucket."""
        carries = _shards(layers)
        for bucket in self.layout.buckets([(2 * i, 2 * i + 1) for i in which]):
            names = [layers[j // 2].name for j in bucket[::2]]
            shards = [carries[j] for j in bucket]
            keys = [f"{name}.{key}" for name in names for key in "CD"]
            stacks = [[self._precise(*pair)] for pair in zip(keys, shards, strict=True)]
            layout = self.layout.only(bucket)
            grams, split_rows = layout.grams_and_split_rows(stacks)
            compressions = self._solve(torch.stack(grams).cpu())
            mixes = [mix for done in compressions for mix in (done.on_C, done.on_D)]
            for j, (key, shard) in enumerate(zip(keys, shards, strict=True)):
                mixed = mixed_rows(stacks[j], mixes[j], layout.split[j], split_rows[j])
                self._write(key, shard.local, mixed.float())
            for name, done in zip(names, compressions, strict=True):
                self.modules[name].used = done.kept
                self.lost[name] += done.lost
                self.shares[name] = self.lost[name] / done.norm if done.norm else 0.0
                self.compressed[name] = done.kept
        self._warn()

    def _solve(self, grams: Tensor) -> list[Compression]:
        """From CᵀC and DᵀD of each layer in turn (2·layers, K, K): each rank solves its share."""
        pairs, K = grams.unflatten(0, (-1, 2)), grams.shape[-1]
        share = ceil_div(len(pairs), self.world.size)
        mine = pairs[self.world.rank * share : (self.world.rank + 1) * share]
        rows = torch.zeros(share, 2 * K * K + 3, dtype=torch.float64)
        for row, (gram_c, gram_d) in zip(rows, mine, strict=False):
            done = compression(gram_c, gram_d, self.rank)
            numbers = torch.tensor([done.kept, done.lost, done.norm], dtype=torch.float64)
            row.copy_(torch.cat([done.on_C.flatten(), done.on_D.flatten(), numbers]))
        solved = []
        for row in self.world.gather_rows(rows).cpu()[: len(pairs)]:
            on_c, on_d, numbers = row.split([K * K, K * K, 3])
            kept, lost, norm = numbers.tolist()
            solved.append(Compression(on_c.view(K, K), on_d.view(K, K), int(kept), lost, norm))
        return solved

    def _precise(self, key: str, shard: FlatShard) -> FlatShard:
        """In fp32, with what 16 bits do not hold."""
        low = self.low_halves.get(key)
        return shard if low is None else shard.like(join_halves(shard.local, low))

    def _write_columns(self, key: str, shard: FlatShard, columns: slice, values: Tensor) -> None:
        """``M[:, columns] = values`` (rows, columns) float32 on this rank's range."""
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

    def _write(self, key: str, local: Tensor, values: Tensor) -> None:
        low = self.low_halves.get(key)
        if low is None:
            local.copy_(values)
        else:
            for whole, part in zip((local, low), split_halves(values, local.dtype), strict=True):
                whole.copy_(part)

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
        """Of the compressions since the last one: columns kept, and the bound on what was lost.

        The bound is the sum of the norms that all compressions of a layer lost, over the norm of
        its carry.
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
        # Copies: a checkpoint is written while training goes on.
        lost, shares = dict(self.lost), dict(self.shares)
        return {"used": used, "lost": lost, "shares": shares, "warned": self.warned}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, used in state["used"].items():
            self.modules[name].used = int(used)
        self.lost, self.shares = dict(state["lost"]), dict(state["shares"])
        self.warned = bool(state["warned"])


def compression(gram_c: Tensor, gram_d: Tensor, rank: int) -> Compression:
    """The best approximation of C Dᵀ of a rank, from CᵀC and DᵀD (K, K) float64."""
    norm_square = float((gram_c * gram_d).sum())
    on_c, on_d = torch.zeros_like(gram_c), torch.zeros_like(gram_d)
    if norm_square <= 0:
        return Compression(on_c, on_d, 0, 0.0, 0.0)
    # The same C Dᵀ with columns as long in D as in C: then what is small in one is small in both.
    lengths_c, lengths_d = gram_c.diagonal().sqrt(), gram_d.diagonal().sqrt()
    alive = (lengths_c > 0) & (lengths_d > 0)
    balance = torch.where(alive, (lengths_d / lengths_c).sqrt(), 1.0)
    balance[~alive] = 0
    back = torch.where(alive, 1 / balance, 0.0)
    gram_c, gram_d = balance[:, None] * gram_c * balance, back[:, None] * gram_d * back
    (root_c, pinv_c), (root_d, pinv_d) = _roots(gram_c), _roots(gram_d)
    left, sigma, right = torch.linalg.svd(root_c.T @ root_d)
    # Singular values that rounding to fp32 loses anyway are not worth their columns.
    kept = min(rank, int((sigma > 2**-26 * sigma[0]).sum()))
    roots = sigma[:kept].sqrt()
    X, Y = pinv_c @ left[:, :kept] * roots, pinv_d @ right[:kept].T * roots
    on_c[:, :kept], on_d[:, :kept] = balance[:, None] * X, back[:, None] * Y
    rest = torch.eye(len(gram_c), dtype=gram_c.dtype) - X @ Y.T
    truncated = float(((gram_c @ rest) * (rest @ gram_d)).sum().clamp_min(0).sqrt())
    rounded = 2**-23 * float((sigma[0] * sigma[:kept].sum()).sqrt())
    return Compression(on_c, on_d, kept, truncated + rounded, norm_square**0.5)


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """``F`` and ``F⁺ᵀ`` with ``gram = F Fᵀ``, F (K, K); eigenvalues of rounding's size are zero."""
    values, vectors = torch.linalg.eigh(gram)
    alive = values > NOISE * len(gram) * values[-1]
    roots = torch.where(alive, values.clamp_min(0).sqrt(), 0.0)
    inverse = torch.where(alive, 1 / roots, 0.0)
    return vectors * roots, vectors * inverse


def _carry(layer: LayerShards) -> tuple[FlatShard, FlatShard]:
    assert layer.carry is not None
    return layer.carry


def _shards(layers: Sequence[LayerShards]) -> list[FlatShard]:
    """C and D of each layer in turn."""
    return [shard for layer in layers for shard in _carry(layer)]
