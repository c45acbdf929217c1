"""Methods by name: which layers, how they start, whether they are rescaled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from scalora_dist.adapters.inject import inject
from scalora_dist.adapters.layers import LowRankLinear
from scalora_dist.config import MethodArguments
from scalora_dist.engines.base import Engine
from scalora_dist.rescale import Rescaler


@dataclass(frozen=True)
class Method:
    """One method of the papers.

    Attributes:
        scaling: s of ``W x + s·A Bᵀ x``.
        rescales: whether the ScaLoRA transform runs before the optimizer's step.
    """

    scaling: Callable[[MethodArguments], float]
    rescales: bool


def _lora_scaling(args: MethodArguments) -> float:
    return args.lora_alpha / args.rank


METHODS = {
    "lora": Method(scaling=_lora_scaling, rescales=False),
    "scalora": Method(scaling=_lora_scaling, rescales=True),
}


def add_layers(
    model: PreTrainedModel, args: MethodArguments, *, seed: int, dtype: torch.dtype
) -> dict[str, LowRankLinear]:
    """Freeze ``model`` and add the method's layers, {name: layer} in model order."""
    return inject(
        model,
        args.target_modules,
        rank=args.rank,
        scaling=METHODS[args.method].scaling(args),
        dropout=args.lora_dropout,
        seed=seed,
        dtype=dtype,
    )


def make_rescaler(engine: Engine, args: MethodArguments) -> Rescaler | None:
    """What transforms the layers every ``scaling_interval`` steps, or None."""
    if not METHODS[args.method].rescales:
        return None
    return Rescaler(
        engine.layers(gradients=False),
        engine.world,
        rule=args.scaling_rule,
        eta_lipschitz=args.eta_lipschitz,
        bounds=args.bounds,
        merge_rounding=args.merge_rounding,
    )
