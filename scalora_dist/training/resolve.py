"""Decides, once, what the user left to the number of ranks and to the base model."""

from __future__ import annotations

from dataclasses import replace

from scalora_dist.config.method import MethodArguments
from scalora_dist.config.options import Options
from scalora_dist.config.training import TrainArguments
from scalora_dist.engines.build import check_engine_choice
from scalora_dist.errors import UserError
from scalora_dist.methods.registry import METHODS
from scalora_dist.model_io.serving import served_rank
from scalora_dist.modeling.load import BaseModelSpec


def resolve(options: Options, ranks: int, base: BaseModelSpec) -> Options:
    """Decide the global batch and its accumulation, ηL, where merges go, and a carry's size.

    Also checks these options against each other, the engine and the ranks.

    Args:
        options: as they were given.
        ranks: world size.
        base: facts about the base model.

    Returns:
        the options that the whole run keeps. Resolving them again changes nothing.

    Raises:
        UserError: the options contradict each other, the ranks or the base model.
    """
    check_engine_choice(options, ranks)
    method = resolve_merges(options.method, quantized=base.fourbit is not None)
    if options.train.torch_compile and base.fourbit:
        raise UserError(
            "--torch_compile cannot compile bitsandbytes' 4-bit kernels: leave it out, or load the "
            "model unquantized"
        )
    if options.train.torch_compile and method.merge_target == "carry":
        raise UserError(
            "--torch_compile would compile again after each merge into a carry: leave it out, or "
            "set --merge_target weight"
        )
    if method.reads("eta_lipschitz"):
        method = replace(method, eta_lipschitz=method.eta_l)
    return replace(options, train=resolve_batch(options.train, ranks), method=method)


def resolve_batch(train: TrainArguments, ranks: int) -> TrainArguments:
    """Make ``train_batch_size`` and ``gradient_accumulation_steps`` agree on ``ranks`` ranks.

    Raises:
        UserError: the global batch is not a whole number of micro-batches on every rank, or does
            not agree with the given ``gradient_accumulation_steps``.
    """
    at_once = train.per_device_train_batch_size * ranks
    of_all = train.train_batch_size
    if of_all is None:
        return replace(train, train_batch_size=at_once * train.gradient_accumulation_steps)
    accumulation, rest = divmod(of_all, at_once)
    if rest:
        raise UserError(
            f"--train_batch_size {of_all} is no multiple of {ranks} rank(s) × "
            f"{train.per_device_train_batch_size} examples: change the ranks or "
            "--per_device_train_batch_size"
        )
    if train.gradient_accumulation_steps not in (1, accumulation):
        raise UserError(
            f"--train_batch_size {of_all} takes {accumulation} micro-batch(es) on {ranks} rank(s): "
            "leave out --gradient_accumulation_steps"
        )
    return replace(train, gradient_accumulation_steps=accumulation)


def resolve_merges(args: MethodArguments, *, quantized: bool) -> MethodArguments:
    """Fill in where merges go, and how large the carry is.

    Args:
        quantized: whether the base model is in 4 bits.

    Raises:
        UserError: the method cannot train a 4-bit base, or options contradict each other.
    """
    method, default = METHODS[args.name], MethodArguments()
    if quantized and method.needs_dense:
        raise UserError(
            f"--method {args.name} reads or changes W itself, which 4 bits do not hold: choose "
            f"one of {', '.join(name for name, x in METHODS.items() if not x.needs_dense)}"
        )
    if not method.merges:
        return args
    if (args.merge_target or ("carry" if quantized else "weight")) == "weight":
        if quantized:
            raise UserError(
                "--merge_target weight: a merge would round away in 4 bits; leave it out or set "
                "carry"
            )
        for name in ("carry_rank", "carry_room", "carry_limit"):
            if getattr(args, name) != getattr(default, name):
                raise UserError(f"--{name} is --merge_target carry's: leave it out or set that")
        return replace(args, merge_target="weight")
    if args.merge_rounding != default.merge_rounding:
        raise UserError("--merge_rounding is --merge_target weight's: leave it out")
    args = replace(
        args,
        merge_target="carry",
        carry_rank=default_carry_rank(args.rank) if args.carry_rank is None else args.carry_rank,
        carry_room=4 * args.rank if args.carry_room is None else args.carry_room,
    )
    for name in ("carry_rank", "carry_room"):
        if getattr(args, name) < args.rank:
            raise UserError(
                f"--{name} {getattr(args, name)} is less than --rank {args.rank}, the columns of "
                f"one merge: set at least {args.rank}"
            )
    return args


def default_carry_rank(rank: int) -> int:
    """R such that R + r is a rank that servers take: the smallest of at least 8·r and 64.

    Above r = 64 none is that large, and R + r = 8·r.
    """
    return (served_rank(max(8 * rank, 64)) or 8 * rank) - rank
