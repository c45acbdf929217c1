"""Counts the bytes that a run keeps on this rank, by part, for a profile."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from scalora_dist.engines.base import Engine
from scalora_dist.layers.adapted_linear import own_parameters
from scalora_dist.layers.carry_linear import CarryLinear


def gradient_bytes(engine: Engine) -> int:
    """Bytes of this rank's reduced gradients. Valid from the last backward to ``Engine.step``."""
    return sum(trained.gradient.local.nbytes for trained in engine.trained_shards())


def state_bytes(engine: Engine, low_halves: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes that this rank keeps from step to step, by part. Call it between steps.

    Other memory of an engine (buckets, gathered weights) shows only in peaks.

    Args:
        low_halves: {parameter: low halves of its 16-bit values}, int16.

    Returns:
        base: parameters and buffers of the base model.
        low_halves: low halves of merged 16-bit weights.
        carry: C and D, which hold merges beside W.
        adapters: all other parameters that the method added.
        masters: fp32 masters of trained parameters. A parameter that is its own master is counted
            only here.
        moments: AdamW's moments.
    """
    trained = engine.trained_shards(gradients=False)
    masters = {t.master.local.untyped_storage().data_ptr() for t in trained}
    layers = engine.adapted.values()
    added = {id(p) for layer in layers for p in own_parameters(layer).values()}
    carries = [layer for layer in layers if isinstance(layer, CarryLinear)]
    carried = {id(p) for layer in carries for p in (layer.C, layer.D)}
    kept = dict.fromkeys(("base", "low_halves", "carry", "adapters", "masters", "moments"), 0)
    for p in engine.model.parameters():
        local = engine.shards.weight(p).local
        if local.untyped_storage().data_ptr() not in masters:
            part = "carry" if id(p) in carried else "adapters" if id(p) in added else "base"
            kept[part] += local.nbytes
    kept["base"] += sum(buffer.nbytes for buffer in engine.model.buffers())
    kept["low_halves"] = sum(half.nbytes for half in low_halves.values())
    kept["masters"] = sum(t.master.local.nbytes for t in trained)
    kept["moments"] = sum(moment.local.nbytes for t in trained for moment in t.moments)
    return kept
