"""Picks the engine that the command line asks for, and imports only that engine."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch

from scalora_dist.config.options import Options
from scalora_dist.distributed.world import World
from scalora_dist.engines.base import Engine
from scalora_dist.errors import UserError
from scalora_dist.modeling.load import BaseModelSpec


def join(options: Options) -> World:
    """Join the launcher's ranks, or be the only one."""
    return World.join(
        local_rank=options.launch.local_rank,
        timeout=timedelta(seconds=options.train.ddp_timeout),
    )


def engine_factory(options: Options, world: World, base: BaseModelSpec) -> Callable[[], Engine]:
    """Check the settings and return a function that makes the engine.

    The engine is DeepSpeed, FSDP2, or, on one rank, the local one.

    Args:
        options: resolved for these ranks and this base model.
        base: facts about the base model, read before it is loaded.

    Raises:
        UserError: the engine's settings are wrong.
    """
    train, launch = options.train, options.launch
    dtype = train.dtype
    if launch.ds_config:
        from scalora_dist.engines.deepspeed import DeepSpeedEngine
        from scalora_dist.engines.ds_config import load_ds_config

        config = load_ds_config(
            launch.ds_config, train, world_size=world.size, hidden_size=base.hidden_size
        )
        return lambda: DeepSpeedEngine(world, config, quantized=base.fourbit is not None)
    if launch.fsdp:
        from scalora_dist.engines.fsdp import FSDPEngine
        from scalora_dist.engines.fsdp_config import load_fsdp_config

        settings = load_fsdp_config(launch.fsdp_config, train, world_size=world.size)
        storage = base.fourbit.storage if base.fourbit else torch.uint8
        if storage.is_floating_point and settings.param_dtype not in (None, storage):
            raise UserError(
                "FSDP's param_dtype would cast the 4-bit codes, which are stored in another dtype: "
                "leave out --bnb_4bit_quant_storage"
            )
        return lambda: FSDPEngine(world, settings, dtype=dtype, max_grad_norm=train.max_grad_norm)
    from scalora_dist.engines.local import LocalEngine

    return lambda: LocalEngine(world, dtype=dtype, max_grad_norm=train.max_grad_norm)


def check_engine_choice(options: Options, ranks: int) -> None:
    """Check that the options name an engine that can train on this number of ranks.

    Args:
        ranks: world size.

    Raises:
        UserError: two engines are given, or settings of an engine that is not chosen, or no engine
            where one is needed.
    """
    launch = options.launch
    if launch.fsdp_config and not launch.fsdp:
        raise UserError("--fsdp_config without --fsdp: give both")
    if launch.ds_config and launch.fsdp:
        raise UserError("--ds_config and --fsdp are two engines: give one")
    if launch.ds_config or launch.fsdp:
        return
    if ranks > 1:
        raise UserError(
            f"{ranks} ranks need an engine: give --ds_config zero3 (or a file) or --fsdp"
        )
    if options.train.fp16:
        raise UserError("--fp16 needs DeepSpeed's loss scale: set --bf16, or give --ds_config")
