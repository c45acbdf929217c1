"""This rank's shards of layers and parameters, as engines hand them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from scalora_dist.core.flat_shard import FlatShard


@dataclass(frozen=True)
class LayerShards:
    """This rank's shards of one adapted layer between the last backward and the optimizer's step.

    All are views of the engine's own storage. W is (m, n); A and its gradient and moments (m, r);
    B and its (n, r). A and B are the fp32 masters. Each factor's gradient and moments have that
    factor's range; W's range need not agree with A's. Gradients may be 16-bit and carry the loss
    scale. ``moments_*`` are (m, v), empty before the first step.
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
    """A and B of each layer in turn: the order of every ``Layout`` over factors."""
    return [factor for layer in layers for factor in (layer.A, layer.B)]


def gradient_shards(layers: Sequence[LayerShards]) -> list[FlatShard]:
    """∇A and ∇B of each layer in turn, as ``factor_shards`` has A and B."""
    return [grad for layer in layers for grad in (layer.grad_A, layer.grad_B)]


@dataclass(frozen=True)
class TrainedShard:
    """This rank's range of one trained parameter, as views of the engine's own storage.

    Attributes:
        master: fp32. gradient: may be 16-bit and carry the loss scale; stands for the master
            where gradients were not asked for. moments: (m, v), empty before the first step.
    """

    name: str
    master: FlatShard
    gradient: FlatShard
    moments: tuple[FlatShard, ...]


class NamedShard(NamedTuple):
    """A parameter under its name in the model and with its shape, as a flat range of a matrix."""

    name: str
    shape: torch.Size
    shard: FlatShard


def as_matrix(shape: torch.Size) -> tuple[int, int]:
    """Any parameter's shape as (rows, cols), for a FlatShard."""
    return (shape[0], shape[1:].numel()) if len(shape) else (1, 1)
