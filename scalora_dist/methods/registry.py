"""The registry of methods: added layers, initialization and work during training, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from scalora_dist.config.method import MethodArguments, MethodName
from scalora_dist.config.options import Options
from scalora_dist.engines.base import Engine
from scalora_dist.layers.adapted_linear import CoreLinear, LowRankLinear, SquareLinear
from scalora_dist.layers.carry_linear import CarryLinear
from scalora_dist.layers.lora_init import lora_init
from scalora_dist.layers.peft_layers import Kind, add_peft_layers
from scalora_dist.layers.target_modules import inject, reached_by_text
from scalora_dist.methods.adamw_direction import adamw_direction
from scalora_dist.methods.init.cores import init_lora_sb, init_lora_xs
from scalora_dist.methods.init.factors import init_lora_ga, init_pissa
from scalora_dist.methods.lora_pro import LoraPro
from scalora_dist.methods.merger import Merger
from scalora_dist.methods.method import AddContext, AddLayers, Layers, Method
from scalora_dist.methods.relora import ReloraRestart
from scalora_dist.methods.scalora import Rescaler

Scaling: TypeAlias = Callable[[MethodArguments, int], float]


# --- added layers --------------------------------------------------------------------------------


def _low_rank(scaling: Scaling) -> AddLayers:
    def add(model: PreTrainedModel, context: AddContext) -> dict[str, LowRankLinear]:
        args, dtype = context.args, context.dtype

        def adapt(name: str, linear: nn.Linear) -> LowRankLinear:
            m, n = linear.out_features, linear.in_features
            a, b = lora_init(name, m, n, args.rank, seed=context.seed, dtype=dtype)
            s, dropout = scaling(args, n), args.lora_dropout
            if args.merge_target != "carry":
                return LowRankLinear.adapt(linear, a, b, scaling=s, dropout=dropout)
            layer = CarryLinear.adapt(linear, a, b, scaling=s, dropout=dropout)
            assert args.carry_rank is not None and args.carry_room is not None
            layer.add_carry(args.carry_rank + args.carry_room, dtype)
            return layer

        return inject(model, args.target_modules, args.rank, adapt, shape_of=context.shape_of)

    return add


def _zero_initialized(kind: type[CoreLinear] | type[SquareLinear], scaling: Scaling) -> AddLayers:
    def add(model: PreTrainedModel, context: AddContext) -> Layers:
        args, dtype = context.args, context.dtype

        def adapt(_: str, linear: nn.Linear) -> nn.Module:
            s = scaling(args, linear.in_features)
            return kind.adapt(linear, args.rank, scaling=s, dropout=args.lora_dropout, dtype=dtype)

        return inject(model, args.target_modules, args.rank, adapt, shape_of=context.shape_of)

    return add


def _by_peft(kind: Kind, *, directions: int = 1) -> AddLayers:
    return lambda model, context: add_peft_layers(
        model,
        context.args,
        kind,
        seed=context.seed,
        directions=directions,
        shape_of=context.shape_of,
    )


def _all_parameters(model: PreTrainedModel, context: AddContext) -> Layers:
    """Full fine-tuning: trains every parameter and adds no layers.

    Returns the linear layers, only so that their updates can be measured. For multimodal models,
    only the language model is trained: weight decay would shrink weights that no text reaches.
    """
    reached, head = reached_by_text(model), model.get_output_embeddings()
    model.requires_grad_(False)
    for module in reached:
        module.requires_grad_(True)
    linear = {n: x for n, x in model.named_modules() if type(x) is nn.Linear and x is not head}
    return {n: x for n, x in linear.items() if x in reached}


# --- scaling s and learning rates ----------------------------------------------------------------


def lora_scaling(args: MethodArguments, in_features: int) -> float:
    return args.lora_alpha / args.rank


def rslora_scaling(args: MethodArguments, in_features: int) -> float:
    """arXiv 2312.03732: s = α/√r."""
    return args.lora_alpha / args.rank**0.5


def lora_alpha_scaling(args: MethodArguments, in_features: int) -> float:
    """LoRA-α: s = α/r with α = 256·√r (variant I) or √(3·n·r) for each layer (variant II)."""
    alpha = {"I": 256 * args.rank**0.5, "II": (3 * in_features * args.rank) ** 0.5}
    return args.alpha_multiplier * alpha[args.alpha_variant] / args.rank


def _unscaled(args: MethodArguments, in_features: int) -> float:
    return 1.0


def lora_plus_rate(name: str, args: MethodArguments) -> float:
    """LoRA+ (arXiv 2402.12354): A (the paper's B) has ``lr_ratio`` times the learning rate."""
    return args.lr_ratio if name.endswith(".A") else 1.0


# --- work during training ------------------------------------------------------------------------


def _rescaler(engine: Engine, merger: Merger | None, options: Options) -> Rescaler:
    assert merger is not None
    args = options.method
    direction = None
    if args.scaling_rule == "adamw":
        norm = options.train.max_grad_norm
        direction = partial(adamw_direction, engine, max_grad_norm=norm)
    return Rescaler(
        merger,
        rule=args.scaling_rule,
        eta_lipschitz=args.eta_l,
        bounds=args.bounds,
        interval=args.interval or 1,
        threshold=0.0 if args.interval else args.auto_threshold,
        fp16=engine.gradient_dtype == torch.float16,
        direction=direction,
    )


def _restart(merger: Merger, args: MethodArguments, seed: int) -> ReloraRestart:
    return ReloraRestart(merger, interval=args.relora_interval, prune=args.relora_prune, seed=seed)


# --- the registry --------------------------------------------------------------------------------

METHODS: dict[MethodName, Method] = {
    "scalora": Method(
        _low_rank(lora_scaling),
        transform=_rescaler,
        edits_weights=True,
        merges=True,
    ),
    "lora": Method(_low_rank(lora_scaling)),
    "rslora": Method(_low_rank(rslora_scaling)),
    "lora-alpha": Method(_low_rank(lora_alpha_scaling)),
    "lora-plus": Method(_low_rank(lora_scaling), rate=lora_plus_rate),
    "lora-pro": Method(
        _low_rank(lora_scaling), transform=lambda engine, merger, options: LoraPro(engine)
    ),
    "relora": Method(
        _low_rank(lora_scaling),
        restart=_restart,
        edits_weights=True,
        merges=True,
    ),
    "lora-xs": Method(_zero_initialized(CoreLinear, lora_scaling), initialize=init_lora_xs),
    "lora-sb": Method(
        _zero_initialized(CoreLinear, _unscaled),
        initialize=init_lora_sb,
    ),
    "mora": Method(_zero_initialized(SquareLinear, _unscaled), own_factors=False),
    "full": Method(_all_parameters, own_factors=False, needs_dense=True),
    # PEFT has its own 4-bit layers.
    "peft-lora": Method(_by_peft("lora"), own_factors=False, needs_dense=True),
    "dora": Method(_by_peft("dora"), own_factors=False, needs_dense=True),
    "hira": Method(_by_peft("hira"), own_factors=False, needs_dense=True),
    "pissa": Method(
        _by_peft("lora"),
        initialize=init_pissa,
        edits_weights=True,
        own_factors=False,
        needs_dense=True,
    ),
    "lora-ga": Method(
        _by_peft("lora", directions=2),  # B takes the gradient's first r directions, A the next r
        initialize=init_lora_ga,
        edits_weights=True,
        own_factors=False,
        needs_dense=True,
    ),
}


def writes_adapter(options: Options) -> bool:
    """Whether a run leaves an adapter: its layers' own factors are ΔW, or it approximates ΔW.

    Args:
        options: the options after ``resolve``.
    """
    method, carried = METHODS[options.method.name], options.method.merge_target == "carry"
    own = method.own_factors and (not method.edits_weights or carried)
    return own or options.train.adapter_rank is not None
