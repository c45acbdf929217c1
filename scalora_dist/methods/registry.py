"""The registry of methods: added layers, initialization and work during training, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from scalora_dist.config.method import MethodArguments
from scalora_dist.engines.base import Engine
from scalora_dist.errors import UserError
from scalora_dist.layers.adapted_linear import CoreLinear, LowRankLinear, SquareLinear
from scalora_dist.layers.carry_linear import CarryLinear
from scalora_dist.layers.lora_init import lora_init
from scalora_dist.layers.peft_layers import Kind, add_peft_layers
from scalora_dist.layers.target_modules import inject, reached_by_text
from scalora_dist.methods.init.cores import init_lora_sb, init_lora_xs
from scalora_dist.methods.init.factors import init_lora_ga, init_pissa
from scalora_dist.methods.lora_pro import LoraPro
from scalora_dist.methods.merger import Merger
from scalora_dist.methods.method import AddContext, AddLayers, Layers, Method
from scalora_dist.methods.relora import ReloraRestart
from scalora_dist.methods.scalora import Rescaler

Scaling: TypeAlias = Callable[[MethodArguments, int], float]


def find_method(args: MethodArguments) -> Method:
    """Look up the method that ``args`` names.

    Raises:
        UserError: there is no such method, or an option is set that the method does not read.
    """
    if args.name not in METHODS:
        raise UserError(f"--method {args.name}: choose one of {', '.join(METHODS)}")
    method = METHODS[args.name]
    default = MethodArguments()
    for field in fields(args):
        unread = field.name not in ("method", *method.options)
        if unread and getattr(args, field.name) != getattr(default, field.name):
            raise UserError(f"--method {args.name} does not read --{field.name}: leave it out")
    return method


def resolve_merge_options(args: MethodArguments, method: Method, *, quantized: bool) -> None:
    """Set the merge options that were left at None. The defaults depend on the base model.

    Args:
        quantized: whether the base model is in 4 bits.

    Raises:
        UserError: the method cannot train a 4-bit base, or options contradict each other.
    """
    if quantized and method.needs_dense:
        raise UserError(
            f"--method {args.name} reads or changes W itself, which 4 bits do not hold: choose "
            f"one of {', '.join(name for name, x in METHODS.items() if not x.needs_dense)}"
        )
    if not method.merges:
        return
    args.merge_target = args.merge_target or ("carry" if quantized else "weight")
    if args.merge_target == "weight":
        if quantized:
            raise UserError(
                "--merge_target weight: a merge would round away in 4 bits; leave it out or set "
                "carry"
            )
        for name in ("carry_rank", "carry_room", "carry_limit"):
            if getattr(args, name) != getattr(MethodArguments(), name):
                raise UserError(f"--{name} is --merge_target carry's: leave it out or set that")
        return
    if args.merge_rounding != MethodArguments().merge_rounding:
        raise UserError("--merge_rounding is --merge_target weight's: leave it out")
    args.carry_rank = 8 * args.rank if args.carry_rank is None else args.carry_rank
    args.carry_room = 4 * args.rank if args.carry_room is None else args.carry_room
    for name in ("carry_rank", "carry_room"):
        if getattr(args, name) < args.rank:
            raise UserError(
                f"--{name} {getattr(args, name)} is less than --rank {args.rank}, the columns of "
                f"one merge: set at least {args.rank}"
            )


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


def _rescaler(engine: Engine, merger: Merger | None, args: MethodArguments) -> Rescaler:
    assert merger is not None
    return Rescaler(
        merger,
        rule=args.scaling_rule,
        eta_lipschitz=args.eta_lipschitz,
        bounds=args.bounds,
        interval=args.interval or 1,
        threshold=0.0 if args.interval else args.auto_threshold,
        fp16=engine.gradient_dtype == torch.float16,
    )


def _restart(merger: Merger, args: MethodArguments, seed: int) -> ReloraRestart:
    return ReloraRestart(merger, interval=args.relora_interval, prune=args.relora_prune, seed=seed)


# --- the registry --------------------------------------------------------------------------------

_LAYERS = ("rank", "lora_dropout", "target_modules")
_LORA = (*_LAYERS, "lora_alpha")
_SAMPLES = ("start_samples", "start_memory")
_RESCALE = ("scaling_rule", "scaling_interval", "auto_threshold", "eta_lipschitz", "scale_bounds")
_MERGE = ("merge_target", "carry_rank", "carry_room", "carry_limit", "merge_rounding")
_RELORA = ("relora_interval", "relora_prune", "relora_warmup_steps")

METHODS = {
    "scalora": Method(
        _low_rank(lora_scaling),
        (*_LORA, *_RESCALE, *_MERGE),
        transform=_rescaler,
        edits_weights=True,
        merges=True,
    ),
    "lora": Method(_low_rank(lora_scaling), _LORA),
    "rslora": Method(_low_rank(rslora_scaling), _LORA),
    "lora-alpha": Method(
        _low_rank(lora_alpha_scaling), (*_LAYERS, "alpha_variant", "alpha_multiplier")
    ),
    "lora-plus": Method(_low_rank(lora_scaling), (*_LORA, "lr_ratio"), rate=lora_plus_rate),
    "lora-pro": Method(
        _low_rank(lora_scaling), _LORA, transform=lambda engine, merger, args: LoraPro(engine)
    ),
    "relora": Method(
        _low_rank(lora_scaling),
        (*_LORA, *_RELORA, *_MERGE),
        restart=_restart,
        edits_weights=True,
        merges=True,
    ),
    "lora-xs": Method(_zero_initialized(CoreLinear, lora_scaling), _LORA, initialize=init_lora_xs),
    "lora-sb": Method(
        _zero_initialized(CoreLinear, _unscaled),
        (*_LAYERS, *_SAMPLES, "sb_eta"),
        initialize=init_lora_sb,
    ),
    "mora": Method(_zero_initialized(SquareLinear, _unscaled), _LAYERS),
    "full": Method(_all_parameters, (), needs_dense=True),
    "peft-lora": Method(_by_peft("lora"), _LORA, needs_dense=True),  # PEFT has its own 4-bit layers
    "dora": Method(_by_peft("dora"), _LORA, needs_dense=True),
    "hira": Method(_by_peft("hira"), _LAYERS, needs_dense=True),
    "pissa": Method(
        _by_peft("lora"), _LORA, initialize=init_pissa, edits_weights=True, needs_dense=True
    ),
    "lora-ga": Method(
        _by_peft("lora", directions=2),  # B takes the gradient's first r directions, A the next r
        (*_LORA, *_SAMPLES),
        initialize=init_lora_ga,
        edits_weights=True,
        needs_dense=True,
    ),
}
