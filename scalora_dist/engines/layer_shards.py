"""Data classes for this rank's shards of layers and parameters, returned by engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from scalora_dist.core.flat_shard import FlatShard


@dataclass(frozen=True)
class LayerShards:
    """This rank's shards of one adapted layer between the last backward and the optimizer's step.

    All shards are views of the engine's own storage. A factor's gradient and moments have the same
    range as the factor. The range of W may differ from that of A.

    Attributes:
        name: the layer's name.
        scaling: s.
        W: frozen weight (m, n).
        A: fp32 master (m, r).
        B: fp32 master (n, r).
        grad_A: gradient (m, r), of ``Engine.gradient_dtype``, multiplied by the loss scale.
        grad_B: gradient (n, r), like ``grad_A``.
        moments_A: AdamW's (m, v) of A, each (m, r); empty before the first step.
        moments_B: AdamW's (m, v) of B, each (n, r); empty before the first step.
        carry: (C, D) with m and n rows, frozen; None: the layer has no carry.
    """

    name: str
    scaling: float
    W: FlatShard
    A: FlatShard
    B: FlatShard
    grad_A: FlatShard
    grad_B: FlatShard
    moments_A: tuple[FlatShard, ...]
    moments_B: tuple[FlatShard, ...]
    carry: tuple[FlatShard, FlatShard] | None = None


def factor_shards(layers: Sequence[LayerShards]) -> list[FlatShard]:
    """A and B of each layer in turn. Every ``Layout`` over factors has this order."""
    return [factor for layer in layers for factor in (layer.A, layer.B)]


def gradient_shards(layers: Sequence[LayerShards]) -> list[FlatShard]:
    """∇A and ∇B of each layer in turn, in the order of ``factor_shards``."""
    return [grad for layer in layers for grad in (layer.grad_A, layer.grad_B)]


def moment_shards(layers: Sequence[LayerShards]) -> list[list[FlatShard]]:
    """[m, v] of A and B of each layer in turn; [] before the first step."""
    pairs = [pair for layer in layers for pair in (layer.moments_A, layer.moments_B)]
    return [list(moments) for moments in zip(*pairs, strict=True)]


@dataclass(frozen=True)
class TrainedShard:
    """This rank's range of one trained parameter, as views of the engine's own storage.

    Attributes:
        name: the parameter's name.
        master: fp32 master.
        gradient: gradient, of ``Engine.gradient_dtype``, multiplied by the loss scale. The master,
            if gradients were not asked for.
        moments: AdamW's (m, v); empty before the first step.
    """

    name: str
    master: FlatShard
    gradient: FlatShard
    moments: tuple[FlatShard, ...]


class NamedShard(NamedTuple):
    """This rank's shard of a parameter, with the parameter's name in the model and its shape."""

    name: str
    shape: torch.Size
    shard: FlatShard


def as_matrix(shape: torch.Size) -> tuple[int, int]:
    """The (rows, cols) of a FlatShard for a parameter of any shape."""
    return (shape[0], shape[1:].numel()) if len(shape) else (1, 1)
