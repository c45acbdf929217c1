"""The ScaLoRA transform of all layers, on each rank's own shards.

It runs between the last backward and the optimizer's step (arXiv 2510.23818, Algorithm 1):

    grams    one all-reduce of small float64 blocks for all layers together; before it, for the rule
             adamw, one of the gradients' norm
    solve    α and β of this rank's share of the layers, then one all-gather
    gather   full A and B by one all-gather per bucket (W is never sent)
    merge    W += s·A diag(1 − α∘β) Bᵀ on the ranges of W that this rank owns
    scale    A, B, their gradients and AdamW's moments (Lemmas 2 and 4)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.scale_solver import Rule, Scales, solve
from scalora_dist.engines.layer_shards import LayerShards, factor_shards, gradient_shards
from scalora_dist.methods.merger import Merger
from scalora_dist.methods.transform import Transform, TransformReport
from scalora_dist.profiling.clock import Clock


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
        directions: Callable[[Sequence[LayerShards]], list[FlatShard]] | None = None,
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
            directions: finds N_A and N_B, as ``adamw_directions``. For rule "adamw" only.
        """
        assert (directions is not None) == (rule == "adamw")
        self.merger = merger
        self.world = merger.world
        self.rule = rule
        self.eta_lipschitz = eta_lipschitz
        self.bounds = bounds
        self.interval = interval
        self.threshold = threshold
        self.fp16 = fp16
        self.directions = directions

    def due(self, steps_taken: int) -> bool:
        return steps_taken % self.interval == 0

    @torch.no_grad()
    def __call__(self, layers: Sequence[LayerShards], clock: Clock) -> TransformReport:
        clock.begin("grams")
        gram_a, gram_b = self.grams(layers)
        clock.begin("solve")
        if not bool(torch.isfinite(gram_a).all() & torch.isfinite(gram_b).all()):
            return self.refuse(layers)
        scales = self.keep_unmoved(self.solve(layers, gram_a, gram_b))
        # Squared norms of gradient columns, (layers, r). A's gradient scales by β and B's by α.
        rank = layers[0].A.shape[1]
        norms_a, norms_b = (_gradient_diagonal(gram, rank) for gram in (gram_a, gram_b))
        scaled_a, scaled_b = norms_a * scales.beta**2, norms_b * scales.alpha**2
        if not self.fits(layers, scales):
            return self.refuse(layers)
        self.merge(layers, scales, clock)
        clock.begin("scale")
        scale_factors_(layers, scales)
        return TransformReport(
            applied=True,
            grad_norm_before=float((norms_a.sum() + norms_b.sum()).sqrt()),
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

        For rule "adamw" those of ``[A,∇A,N_A]`` and ``[B,∇B,N_B]``, (layers, 3r, 3r). Summed over
        ranks by one all-reduce for all layers.
        """
        columns = [factor_shards(layers), gradient_shards(layers)]
        if self.directions is not None:
            columns.append(self.directions(layers))
        stacks = list(zip(*columns, strict=True))
        grams = torch.stack(self.merger.layout.grams(stacks)).cpu()
        return grams[0::2], grams[1::2]

    def solve(self, layers: Sequence[LayerShards], gram_a: Tensor, gram_b: Tensor) -> Scales:
        """α and β of every layer. Each rank solves its share, then one all-gather.

        So the scales are bit for bit the same on all ranks.

        Args:
            gram_a: as from ``grams``.
            gram_b: as from ``grams``.
        """
        (scaling,) = {layer.scaling for layer in layers}  # all layers share one s
        share = ceil_div(len(layers), self.world.size)
        mine = slice(self.world.rank * share, (self.world.rank + 1) * share)
        rank = layers[0].A.shape[1]
        # Of the factor and of its step's direction, which is the last of the columns.
        own = torch.arange(2 * rank)
        own[rank:] += gram_a.shape[-1] - 2 * rank
        rows = torch.zeros(share, 2 * rank + 1, dtype=torch.float64)
        if len(layers[mine]):
            scales = solve(
                gram_a[mine][:, own[:, None], own],
                gram_b[mine][:, own[:, None], own],
                scaling=scaling,
                eta_lipschitz=self.eta_lipschitz,
                rule=self.rule,
                bounds=self.bounds,
            )
            solved = torch.cat([scales.alpha, scales.beta, scales.rule[:, None]], dim=1)
            rows[: len(solved)] = solved
        everyone = self.world.gather_rows(rows).cpu()[: len(layers)]
        alpha, beta, rule = everyone.split([rank, rank, 1], dim=1)
        return Scales(alpha, beta, rule[:, 0].long())

    def fits(self, layers: Sequence[LayerShards], scales: Scales) -> bool:
        """Whether fp16 gradients stay finite when they are scaled. One all-reduce, in fp16 only.

        Checked first, because the engine would skip the step after the factors had changed.
        """
        if not self.fp16:
            return True  # scaled gradients stay far below the largest fp32 and bfloat16 number
        largest = 0.0
        for layer, alpha, beta in zip(layers, scales.alpha, scales.beta, strict=True):
            for grad, scale in ((layer.grad_A, beta), (layer.grad_B, alpha)):
                for piece in grad.pieces():
                    columns = piece.block.abs().amax(0).double().cpu() * scale[piece.cols]
                    largest = max(largest, float(columns.max()))
        return self.world.max(largest)[0] < torch.finfo(torch.float16).max

    def merge(self, layers: Sequence[LayerShards], scales: Scales, clock: Clock) -> None:
        """``W += s·A diag(1 − α∘β) Bᵀ``, with A and B before they are scaled."""
        moved = (scales.rule != int(Rule.KEPT)).nonzero()[:, 0].tolist()
        self.merger(layers, 1 - scales.alpha * scales.beta, clock, moved)


def scale_factors_(layers: Sequence[LayerShards], scales: Scales) -> None:
    """Scale the columns of A, B, their gradients and their moments (Lemmas 2 and 4). Local.

    A by α, B by β; ∇A and m_A by β, v_A by β²; ∇B and m_B by α, v_B by α².
    """
    # One float64 copy to the device for all layers. Each shard casts it to its own precision.
    both = torch.stack([scales.alpha, scales.beta]).to(layers[0].A.local.device)
    first, second = both, both**2
    for layer, alpha, beta, alpha2, beta2 in zip(layers, *first, *second, strict=True):
        layer.A.scale_columns_(alpha)
        layer.B.scale_columns_(beta)
        layer.grad_A.scale_columns_(beta)
        layer.grad_B.scale_columns_(alpha)
        for moment, scale in zip(layer.moments_A, (beta, beta2), strict=False):
            moment.scale_columns_(scale)
        for moment, scale in zip(layer.moments_B, (alpha, alpha2), strict=False):
            moment.scale_columns_(scale)


def _gradient_diagonal(gram: Tensor, rank: int) -> Tensor:
    """diag(∇Mᵀ∇M), (layers, r), from a gram as in ``Rescaler.grams``."""
    return gram.diagonal(dim1=-2, dim2=-1)[:, rank : 2 * rank]


def _count(rules: Tensor) -> dict[str, int]:
    """{name of the rule: number of layers that it was used for}."""
    counts = Counter(rules.tolist())
    return {rule.name.lower(): counts[int(rule)] for rule in Rule}
