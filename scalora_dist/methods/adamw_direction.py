"""The direction of AdamW's next step, on each rank's own shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scalora_dist.core.layout import Batch, Layout, global_norm
from scalora_dist.engines.base import Engine
from scalora_dist.engines.layer_shards import LayerShards, gradient_shards, moment_shards


class AdamWDirection:
    """N = m̂ / (√v̂ + ε) of all A and B, with this step's gradient in m̂ and v̂.

    The next step moves a factor by −lr·N, if the factors are not scaled before. Scaling a column of
    the other factor scales its gradient, m̂ and √v̂ alike (Lemma 4), so N stays, but for ε and for
    clipping, which the engine does by the norm of the scaled gradients.
    """

    def __init__(
        self,
        layers: Sequence[LayerShards],
        layout: Layout,
        *,
        betas: tuple[float, float],
        epsilon: float,
        step: int,
        gradient_scale: float | Tensor = 1.0,
    ) -> None:
        """
        Args:
            layers: shards with reduced gradients. They are not changed.
            layout: which rank holds which range of the factors.
            betas: β₁ and β₂.
            epsilon: ε.
            step: number of the step that follows, from 1.
            gradient_scale: what the optimizer multiplies gradients by; a scalar.
        """
        self.layout = layout
        self.moments = moment_shards(layers)
        self.betas, self.epsilon, self.step = betas, epsilon, step
        self.gradient_scale = gradient_scale

    def __call__(self, batch: Batch, gradients: Tensor) -> Tensor:
        """N of a batch's factors, 1-D, as ``Layout.pack`` packs them.

        Args:
            gradients: the packed gradients, 1-D, fp32 or more precise. They are not changed.
        """
        gradients = gradients * self.gradient_scale
        if self.moments:
            m, v = (self.layout.pack(batch, shards) for shards in self.moments)
        else:
            m, v = torch.zeros_like(gradients), torch.zeros_like(gradients)
        (beta1, beta2), step = self.betas, self.step
        m.lerp_(gradients, 1 - beta1).div_(1 - beta1**step)
        v.lerp_(gradients.square(), 1 - beta2).div_(1 - beta2**step)
        return m.div_(v.sqrt_().add_(self.epsilon))


@torch.no_grad()
def adamw_direction(
    engine: Engine, layers: Sequence[LayerShards], layout: Layout, *, max_grad_norm: float
) -> AdamWDirection:
    """The direction of the engine's next step. One all-reduce of a number, for the norm.

    Args:
        engine: its optimizer has β₁, β₂, ε and the number of steps taken.
        layers: as for ``AdamWDirection``.
        layout: likewise.
        max_grad_norm: the norm that the engine clips gradients to; 0: never.
    """
    (group,) = engine.optimizer.param_groups  # A and B share a learning rate
    scale: float | Tensor = 1 / engine.loss_scale
    if max_grad_norm:
        norm = scale * global_norm(gradient_shards(layers), engine.world.device)
        scale = scale * (max_grad_norm / (norm + 1e-6)).clamp(max=1)
    return AdamWDirection(
        layers,
        layout,
        betas=group["betas"],
        epsilon=group["eps"],
        step=engine.state()["optimizer_steps"] + 1,
        gradient_scale=scale,
    )
