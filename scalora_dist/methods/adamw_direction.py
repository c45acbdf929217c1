"""The direction of AdamW's next step, on each rank's own shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scalora_dist.core.flat_shard import FlatShard, global_norm
from scalora_dist.engines.base import Engine
from scalora_dist.engines.layer_shards import LayerShards, gradient_shards


@torch.no_grad()
def adamw_directions(
    engine: Engine, layers: Sequence[LayerShards], max_grad_norm: float
) -> list[FlatShard]:
    """N = m̂ / (√v̂ + ε) of A and B of each layer in turn, with this step's gradient in m̂ and v̂.

    The next step moves a factor by −lr·N, if the factors are not scaled before. Scaling a column of
    the other factor scales its gradient, m̂ and √v̂ alike (Lemma 4), so N stays, but for ε and for
    clipping, which the engine does by the norm of the scaled gradients.

    Args:
        engine: its optimizer has β₁, β₂, ε and the number of steps taken.
        layers: shards with reduced gradients. They are not changed.
        max_grad_norm: the norm that the engine clips gradients to; 0: never.

    Returns:
        N of each factor in the order of ``factor_shards``, fp32, with the factor's range. One
        all-reduce of a number, for the norm.
    """
    (group,) = engine.optimizer.param_groups  # A and B share a learning rate
    scale = 1 / engine.loss_scale
    if max_grad_norm:
        norm = scale * global_norm(gradient_shards(layers), engine.world.device)
        scale *= min(1.0, max_grad_norm / (norm + 1e-6))
    step = engine.state()["optimizer_steps"] + 1
    return directions(
        layers, betas=group["betas"], epsilon=group["eps"], step=step, gradient_scale=scale
    )


def directions(
    layers: Sequence[LayerShards],
    *,
    betas: tuple[float, float],
    epsilon: float,
    step: int,
    gradient_scale: float,
) -> list[FlatShard]:
    """As ``adamw_directions``, of gradients times ``gradient_scale`` in step ``step`` (1, 2, …)."""
    beta1, beta2 = betas
    moments = [pair for layer in layers for pair in (layer.moments_A, layer.moments_B)]
    found = []
    for gradient, pair in zip(gradient_shards(layers), moments, strict=True):
        g = gradient.local.float() * gradient_scale
        m, v = (moment.local for moment in pair) if pair else (torch.zeros_like(g),) * 2
        m = torch.lerp(m, g, 1 - beta1) / (1 - beta1**step)
        v = torch.lerp(v, g.square(), 1 - beta2) / (1 - beta2**step)
        found.append(gradient.like(m / (v.sqrt() + epsilon)))
    return found
