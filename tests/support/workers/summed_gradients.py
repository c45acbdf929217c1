"""Functions that ranks run in tests/engines/test_summed_gradients.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from scalora_dist.core.layout import Layout
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import factor_shards, gradient_shards
from tests.support import runs


class Found(NamedTuple):
    """The reduced gradients of one step, as a rescale would find them.

    Attributes:
        whole: {"<layer>.A" or "<layer>.B": full gradient without the loss scale, float64}.
        dtypes: dtypes in which this rank keeps them.
        frozen: dtypes of the parameters that are not trained.
    """

    whole: dict[str, np.ndarray]
    dtypes: set[torch.dtype]
    frozen: set[torch.dtype]


def gradients(world: World, options: dict[str, Any]) -> Found:
    """Take the first step of a run up to the rescale, with random A and B."""
    # DeepSpeed requires a CPU with fast fp16. For a test, slow fp16 is enough.
    get_accelerator().is_fp16_supported = lambda: True
    trainer = runs.make(world, options)
    micro_batches, engine = trainer.start(), trainer.engine
    with engine.writing():
        # A starts as zero, so that ∇B would be zero too.
        for seed, factor in enumerate(factor_shards(engine.layer_shards(gradients=False))):
            drawn = torch.randn(factor.shape, generator=torch.Generator().manual_seed(seed))
            mine = drawn.flatten()[factor.offset :][: factor.local.numel()]
            factor.local.copy_(0.1 * mine)
    engine.module.train()
    trainer._accumulate(0, trainer.feed.batches.target_tokens(0), micro_batches)
    layers = engine.layer_shards()
    shards = gradient_shards(layers)
    in_fp32 = [shard.like(shard.local.float()) for shard in shards]
    whole = Layout.of(shards, world.device).gather(in_fp32, range(len(shards)))
    names = [f"{layer.name}.{factor}" for layer in layers for factor in "AB"]
    scale = engine.loss_scale
    found = Found(
        {name: x.double().cpu().numpy() / scale for name, x in zip(names, whole, strict=True)},
        {shard.local.dtype for shard in shards if shard.local.numel()},
        {p.dtype for p in engine.model.parameters() if not p.requires_grad},
    )
    trainer.close()
    return found
