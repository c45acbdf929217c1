"""The ScaLoRA transform of all layers, on each rank's own shards.

It runs between the last backward and the optimizer's step (arXiv 2510.23818, Algorithm 1):

    grams    one all-reduce of small float64 blocks for all layers together; before it, for the rule
             adamw, one of the gradients' norm
    solve    α and β of this rank's share of the layers, then one all-gather
    gather   full A and B, bucket by bucket (W is never sent)
    merge    W += s·A diag(1 − α∘β) Bᵀ on the ranges of W that this rank owns
    scale    A, B, their gradients and AdamW's moments (Lemmas 2 and 4)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from scalora_dist.core import host
from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.core.grams import Grams, GramSums, packed
from scalora_dist.core.layout import Batch, Layout
from scalora_dist.core.scale_solver import Rule, Scales, solve
from scalora_dist.engines.layer_shards import (
    LayerShards,
    factor_shards,
    gradient_shards,
    moment_shards,
)
from scalora_dist.methods.adamw_direction import AdamWDirection
from scalora_dist.methods.merger import Merger
from scalora_dist.methods.transform import Transform, TransformReport
from scalora_dist.profiling.clock import Clock

# Makes what computes N_A and N_B of one step.
MakeDirection: TypeAlias = Callable[[Sequence[LayerShards], Layout], AdamWDirection]


class Rescaler(Transform):
    """Chooses α and β for all layers, merges, and rescales A, B, gradients and moments."""

    name = "rescale"

    def __init__(
        self,
        merger: Merger,
        *,
        rule: str,
        eta_lipschitz: float,
        bounds: tuple[float, float] | None,
        interval: int = 1,
        threshold: float = 0.0,
        fp16: bool = False,
        direction: MakeDirection | None = None,
    ) -> None:
        """
        Args:
            merger: merges A and B into the frozen part.
            rule: "paper", "scalar", "nnls" or "adamw", as for ``solve``.
            eta_lipschitz: the product ηL.
            bounds: (lo, hi), bounds on the sizes of scaled columns, or None, as for ``solve``.
            interval: I: rescale before steps 0, I, 2I … (ScaLoRA-I).
            threshold: rescale a layer only if |ln α| or |ln β| of a column is larger than this.
                Otherwise the layer stays unchanged. 0: always rescale.
            fp16: whether gradients are float16 and may overflow when they are scaled.
            direction: finds N_A and N_B of a step, as ``adamw_direction``. For rule "adamw" only.
        """
        assert (direction is not None) == (rule == "adamw")
        self.merger = merger
        self.world = merger.world
        self.rule = rule
        self.eta_lipschitz = eta_lipschitz
        self.bounds = bounds
        self.interval = interval
        self.threshold = threshold
        self.fp16 = fp16
        self.direction = direction
        self.sums = GramSums(merger.layout)

    def due(self, steps_taken: int) -> bool:
        return steps_taken % self.interval == 0

    @torch.no_grad()
    def __call__(self, layers: Sequence[LayerShards], clock: Clock) -> TransformReport:
        clock.begin("grams")
        grams = self._grams(layers)
        clock.begin("solve")
        found = self.solve(layers, grams)
        del grams  # before the factors are gathered
        if found is None:
            return self.refuse(layers)
        scales, norms = self.keep_unmoved(found[0]), found[1]
        if not self.fits(layers, scales):
            return self.refuse(layers)
        self.merge(layers, scales, clock)
        clock.begin("scale")
        scale_factors_(layers, scales, self.merger.layout)
        # A's gradient scales by β and B's by α.
        scaled_a, scaled_b = norms[0] * scales.beta**2, norms[1] * scales.alpha**2
        return TransformReport(
            applied=True,
            grad_norm_before=float(norms.sum().sqrt()),
            grad_norm=float((scaled_a.sum() + scaled_b.sum()).sqrt()),
            details=_count(scales.rule),
        )

    def refuse(self, layers: Sequence[LayerShards]) -> TransformReport:
        skipped = _count(torch.full((len(layers),), int(Rule.SKIPPED)))
        return TransformReport(applied=False, details=skipped)

    def keep_unmoved(self, scales: Scales) -> Scales:
        """``scales`` with α = β = 1 for layers whose scales are all within the threshold."""
        logs = torch.cat([scales.alpha, scales.beta], dim=1).log().abs()
        moved = logs.amax(dim=1) > self.threshold
        if self.threshold == 0 or bool(moved.all()):
            return scales
        kept = torch.full_like(scales.rule, int(Rule.KEPT))
        one = torch.ones_like(scales.alpha)
        return Scales(
            torch.where(moved[:, None], scales.alpha, one),
            torch.where(moved[:, None], scales.beta, one),
            torch.where(moved, scales.rule, kept),
        )

    def grams(self, layers: Sequence[LayerShards]) -> tuple[Tensor, Tensor]:
        """``[A,∇A]ᵀ[A,∇A]`` and ``[B,∇B]ᵀ[B,∇B]``: each (layers, 2r, 2r) float64 on the CPU.

        By every rule. Summed over ranks by one all-reduce for all layers.
        """
        return host.on_host(_by_factor, self._gradient_grams(layers).sums)

    def _gradient_grams(self, layers: Sequence[LayerShards]) -> Grams:
        lists = [factor_shards(layers), gradient_shards(layers)]
        return self.sums(packed(self.merger.layout, lists, _precision(layers)), 2)

    def _grams(self, layers: Sequence[LayerShards]) -> Grams:
        """Grams of A and B of each layer in turn, each with its gradient, on the device.

        For rule "adamw" with N_A and N_B instead, and the squares of the gradients' columns.
        """
        if self.direction is None:
            return self._gradient_grams(layers)
        layout, direction = self.merger.layout, self.direction(layers, self.merger.layout)
        factors, gradients = factor_shards(layers), gradient_shards(layers)

        def columns(batch: Batch) -> Tensor:
            size = (3, batch[-1].flat.stop)
            values = torch.empty(size, dtype=_precision(layers), device=layout.device)
            layout.pack(batch, factors, out=values[0])
            values[1] = direction(batch, layout.pack(batch, gradients, out=values[2]))
            return values

        return self.sums(columns, 2, squares=True)

    def solve(self, layers: Sequence[LayerShards], grams: Grams) -> tuple[Scales, Tensor] | None:
        """α and β of every layer. Each rank solves its share, then one all-gather.

        So the scales are bit for bit the same on all ranks. Two host synchronisations.

        Args:
            grams: as from ``_grams``.

        Returns:
            the scales, and the squared norms of the columns of ∇A and ∇B, (2, layers, r) float64.
            None: a gram is not finite.
        """
        rank, device = layers[0].A.shape[1], self.world.device
        share = ceil_div(len(layers), self.world.size)
        work = partial(self._solve_share, layers, share)
        solved = host.on_host(work, grams.sums, grams.squares)
        if solved is None:
            return None
        rows, norms = solved
        everyone = self.world.gather_rows(host.to_device(rows, device))
        return host.on_host(partial(_read, len(layers), rank), everyone), norms

    def _solve_share(
        self, layers: Sequence[LayerShards], share: int, sums: Tensor, squares: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """[α, β, rule] of this rank's layers, (share, 2r + 1), and norms as in ``solve``."""
        if not bool(torch.isfinite(sums).all() & torch.isfinite(squares).all()):
            return None
        rank = layers[0].A.shape[1]
        if self.direction is None:  # the gradient is in the grams
            squares = sums.diagonal(dim1=-2, dim2=-1)[:, rank:]
        (scaling,) = {layer.scaling for layer in layers}  # all layers share one s
        mine = slice(self.world.rank * share, (self.world.rank + 1) * share)
        rows = torch.zeros(share, 2 * rank + 1, dtype=torch.float64)
        if len(layers[mine]):
            gram_a, gram_b = _by_factor(sums)
            scales = solve(
                gram_a[mine],
                gram_b[mine],
                scaling=scaling,
                eta_lipschitz=self.eta_lipschitz,
                rule=self.rule,
                bounds=self.bounds,
            )
            solved = torch.cat([scales.alpha, scales.beta, scales.rule[:, None]], dim=1)
            rows[: len(solved)] = solved
        return rows, torch.stack(_by_factor(squares))

    def fits(self, layers: Sequence[LayerShards], scales: Scales) -> bool:
        """Whether fp16 gradients stay finite when they are scaled. One all-reduce, in fp16 only.

        Checked first, because the engine would skip the step after the factors had changed.
        """
        if not self.fp16:
            return True  # scaled gradients stay far below the largest fp32 and bfloat16 number
        layout, gradients = self.merger.layout, gradient_shards(layers)
        tables = scale_tables(scales, layers, layout)[1:2]
        largest = torch.zeros((), device=layout.device)
        for batch in layout.batches:
            scaled = layout.pack(batch, gradients) * layout.column_values(batch, tables)[0]
            largest = torch.maximum(largest, scaled.abs().max())
        most = host.on_host(float, self.world.largest(largest))
        return most < torch.finfo(torch.float16).max

    def merge(self, layers: Sequence[LayerShards], scales: Scales, clock: Clock) -> None:
        """``W += s·A diag(1 − α∘β) Bᵀ``, with A and B before they are scaled."""
        moved = (scales.rule != int(Rule.KEPT)).nonzero()[:, 0].tolist()
        self.merger(layers, 1 - scales.alpha * scales.beta, clock, moved)


def scale_factors_(layers: Sequence[LayerShards], scales: Scales, layout: Layout) -> None:
    """Scale the columns of A, B, their gradients and their moments (Lemmas 2 and 4). Local.

    A by α, B by β; ∇A and m_A by β, v_A by β²; ∇B and m_B by α, v_B by α².

    Args:
        layout: which rank holds which range of the factors.
    """
    tables = scale_tables(scales, layers, layout)
    m, v = [[x] for x in moment_shards(layers)] or [[], []]
    layout.scale_columns_(tables, [[factor_shards(layers)], [gradient_shards(layers), *m], v])


def scale_tables(scales: Scales, layers: Sequence[LayerShards], layout: Layout) -> Tensor:
    """What scales the columns of A and B of each layer in turn: (3, 2·layers, r) on the device.

    Those of the factors: α and β. Of their gradients and first moments: β and α. Of their second
    moments: β² and α².
    """
    both = torch.stack([scales.alpha, scales.beta], dim=1)  # (layers, 2, r) float64
    crossed = both.flip(1)
    tables = torch.stack([both, crossed, crossed**2]).flatten(1, 2)
    return host.to_device(tables.to(_precision(layers)), layout.device)


def _precision(layers: Sequence[LayerShards]) -> torch.dtype:
    """The dtype of the work: that of A and B, but fp32 at least."""
    return torch.promote_types(layers[0].A.local.dtype, torch.float32)


def _by_factor(values: Tensor) -> tuple[Tensor, Tensor]:
    """The values of A and those of B, from those of A and B of each layer in turn."""
    return values[0::2], values[1::2]


def _read(layers: int, rank: int, rows: Tensor) -> Scales:
    """The scales of all layers, from the rows of all ranks."""
    alpha, beta, rule = rows[:layers].split([rank, rank, 1], dim=1)
    return Scales(alpha, beta, rule[:, 0].long())


def _count(rules: Tensor) -> dict[str, int]:
    """{name of the rule: number of layers that it was used for}."""
    counts = Counter(rules.tolist())
    return {rule.name.lower(): counts[int(rule)] for rule in Rule}
