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
    the other factor scales its gradient, m̂ and √v̂ alike (Lemma 4), so N stays, but for ε.

    Args:
        engine: its optimizer has β₁, β₂, ε and the number of steps taken.
        layers: shards with reduced gradients. They are not changed.
        max_grad_norm: the norm that the engine clips gradients to; 0: never.

    Returns:
        N of each factor in the order of ``factor_shards``, fp32, with the factor's range. One
        all-reduce of a number, for the norm.
    """
    (group,) = engine.optimizer.param_groups  # A and B share a learning rate
    (beta1, beta2), epsilon = group["betas"], group["eps"]
    step = engine.state()["optimizer_steps"] + 1
    gradients = gradient_shards(layers)
    scale = 1 / engine.loss_scale
    if max_grad_norm:
        norm = scale * global_norm(gradients, engine.world.device)
        scale *= min(1.0, max_grad_norm / (norm + 1e-6))
    moments = [pair for layer in layers for pair in (layer.moments_A, layer.moments_B)]
    directions = []
    for gradient, pair in zip(gradients, moments, strict=True):
        g = gradient.local.float() * scale
        m, v = (moment.local for moment in pair) if pair else (torch.zeros_like(g),) * 2
        m = torch.lerp(m, g, 1 - beta1) / (1 - beta1**step)
        v = torch.lerp(v, g.square(), 1 - beta2) / (1 - beta2**step)
        directions.append(gradient.like(m / (v.sqrt() + epsilon)))
    return directions
