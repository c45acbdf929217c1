"""The ScaLoRA transform of all layers of a model, on each rank's own shards.

Between the last backward and the optimizer's step (arXiv 2510.23818, Algorithm 1):

    grams    one all-reduce of small float64 blocks for all layers together
    solve    α and β of this rank's share of the layers, then one all-gather
    gather   A and B whole, in buckets (W never travels)
    merge    W += s·A diag(1 − α∘β) Bᵀ on the ranges of W that this rank owns
    scale    A, B, their gradients and AdamW's moments (Lemmas 2 and 4)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scalora_dist.engines.base import LayerShards, factor_shards, gradient_shards
from scalora_dist.merge import MergeRounding, add_low_rank_, zero_low_half
from scalora_dist.profiling.clock import Clock
from scalora_dist.shards import Layout
from scalora_dist.solve import Rule, Scales, solve
from scalora_dist.world import World


@dataclass(frozen=True)
class RescaleReport:
    """What one rescale did.

    Attributes:
        applied: False when a gram was not finite, or a scaled gradient would not fit its dtype:
            then nothing was changed and the step must be discarded.
        rules: the rule each layer took, in model order.
        grad_norm_before, grad_norm: of the gradients as they came and as the optimizer sees them,
            over all layers and ranks (loss scale included).
        seconds: of this rank, by part: grams, solve, gather, merge, scale.
    """

    applied: bool
    rules: list[Rule] = field(default_factory=list)
    grad_norm_before: float = float("nan")
    grad_norm: float = float("nan")
    seconds: dict[str, float] = field(default_factory=dict)


class Rescaler:
    """Rescales all layers of one model; holds what does not change between steps.

    Attributes:
        low: {layer: int16 remainders of its 16-bit W}, with ``split`` only; sharded like W.
    """

    def __init__(
        self,
        layers: Sequence[LayerShards],
        world: World,
        *,
        rule: str,
        eta_lipschitz: float,
        bounds: tuple[float, float] | None,
        merge_rounding: MergeRounding,
    ) -> None:
        """Exchange who holds what (one all-gather); ``layers`` in the order of every later call."""
        self.world = world
        self.rule, self.eta_lipschitz, self.bounds = rule, eta_lipschitz, bounds
        self.layout = Layout.of(factor_shards(layers), world.device)
        self.low: dict[str, Tensor] = {}
        if merge_rounding == "split":
            self.low = {
                layer.name: zero_low_half(layer.W)
                for layer in layers
                if layer.W.local.dtype != torch.float32
            }

    @torch.no_grad()
    def __call__(self, layers: Sequence[LayerShards]) -> RescaleReport:
        """Transform ``layers`` in place, or leave all of them as they were (``applied`` False)."""
        clock = Clock(self.world.device)
        gram_a, gram_b = self.grams(layers)
        clock.lap("grams")
        if not bool(torch.isfinite(gram_a).all() & torch.isfinite(gram_b).all()):
            return RescaleReport(applied=False, seconds=clock.seconds)
        scales = self.solve(layers, gram_a, gram_b)
        # Squared norms of the gradients' columns (layers, r); A's gradient takes β and B's takes α.
        norms_a, norms_b = (_gradient_diagonal(gram) for gram in (gram_a, gram_b))
        scaled_a, scaled_b = norms_a * scales.beta**2, norms_b * scales.alpha**2
        if not self.fits(layers, scales):
            return RescaleReport(applied=False, seconds=clock.seconds)
        clock.lap("solve")
        self.merge(layers, scales, clock)
        scale_factors_(layers, scales)
        clock.lap("scale")
        return RescaleReport(
            applied=True,
            rules=[Rule(code) for code in scales.rule.tolist()],
            grad_norm_before=float((norms_a.sum() + norms_b.sum()).sqrt()),
            grad_norm=float((scaled_a.sum() + scaled_b.sum()).sqrt()),
            seconds=clock.seconds,
        )

    def grams(self, layers: Sequence[LayerShards]) -> tuple[Tensor, Tensor]:
        """``[A,∇A]ᵀ[A,∇A]`` and ``[B,∇B]ᵀ[B,∇B]``: (layers, 2r, 2r) float64 on the CPU each."""
        stacks = list(zip(factor_shards(layers), gradient_shards(layers), strict=True))
        grams = torch.stack(self.layout.grams(stacks)).cpu()
        return grams[0::2], grams[1::2]

    def solve(self, layers: Sequence[LayerShards], gram_a: Tensor, gram_b: Tensor) -> Scales:
        """α and β of every layer, the same bit for bit on all ranks: each solves its share."""
        share = -(-len(layers) // self.world.size)
        mine = slice(self.world.rank * share, (self.world.rank + 1) * share)
        rank = gram_a.shape[-1] // 2
        rows = torch.zeros(share, 2 * rank + 1, dtype=torch.float64)
        if len(layers[mine]):
            scales = solve(
                gram_a[mine],
                gram_b[mine],
                scaling=layers[0].scaling,
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
        """Whether fp16 gradients stay finite when scaled: one all-reduce, in fp16 only.

        If not, the engine would skip the step after the factors had changed.
        """
        if layers[0].W.local.dtype != torch.float16:
            return True  # scales stay far from fp32's and bfloat16's largest number
        largest = 0.0
        for layer, alpha, beta in zip(layers, scales.alpha, scales.beta, strict=True):
            for grad, scale in ((layer.grad_A, beta), (layer.grad_B, alpha)):
                for piece in grad.pieces():
                    columns = piece.block.abs().amax(0).double().cpu() * scale[piece.cols]
                    largest = max(largest, float(columns.max()))
        return self.world.max(largest)[0] < torch.finfo(torch.float16).max

    @torch.no_grad()
    def merge(self, layers: Sequence[LayerShards], scales: Scales, clock: Clock) -> None:
        """``W += s·A diag(1 − α∘β) Bᵀ`` with the A and B of before the scaling."""
        shards = factor_shards(layers)
        scalings = torch.tensor([[layer.scaling] for layer in layers], dtype=torch.float64)
        # One copy to the device for all layers: a copy each would wait for it each time.
        weights = (scalings * (1 - scales.alpha * scales.beta)).to(self.world.device)
        for bucket in self.layout.buckets(together=2):
            gathered = self.layout.gather(shards, bucket)
            clock.lap("gather")
            for i, a, b in zip(bucket[::2], gathered[0::2], gathered[1::2], strict=True):
                layer = layers[i // 2]
                left = a * weights[i // 2].to(a)
                add_low_rank_(layer.W, left, b, self.low.get(layer.name))
            clock.lap("merge")


def scale_factors_(layers: Sequence[LayerShards], scales: Scales) -> None:
    """A ← A diag(α), B ← B diag(β); ∇A, m_A take β, v_A β²; ∇B, m_B take α, v_B α². Local."""
    # One copy to the device for all layers, in float64; each shard takes it in its own precision.
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


def _gradient_diagonal(gram: Tensor) -> Tensor:
    """diag(∇ᵀ∇), (layers, r), of [M,∇M]ᵀ[M,∇M], (layers, 2r, 2r)."""
    return gram.diagonal(dim1=-2, dim2=-1)[:, gram.shape[-1] // 2 :]
