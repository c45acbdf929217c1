"""The DeepSpeed engine, ZeRO stage 0 to 3.

Only this file and ``engines/zero_shards.py`` use private attributes of DeepSpeed (read and tested
with 0.19.8). ``tests/engines`` and ``tests/methods`` fail if a release moves them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from scalora_dist.distributed.world import World
from scalora_dist.engines.base import Engine, MakeOptimizer
from scalora_dist.engines.broadcast import broadcast_buffers, match_rank_0, replaced_parameters
from scalora_dist.engines.ds_config import compute_dtype, gradient_dtype
from scalora_dist.engines.zero_shards import ZERO_SHARDS, ZeroParameter, ZeroShards
from scalora_dist.errors import UserError
from scalora_dist.layers.adapted_linear import adapted_linear

deepspeed.utils.logger.setLevel(logging.WARNING)


class DeepSpeedEngine(Engine):
    """A model under ZeRO stage 0, 1, 2 or 3, with or without offload to the CPU."""

    shards: ZeroShards

    def __init__(self, world: World, config: dict[str, Any], *, quantized: bool = False) -> None:
        """
        Args:
            config: a DeepSpeed config without "auto" (see ``engines/ds_config.py``).
            quantized: whether the base model is quantized. transformers cannot shard such a model
                while loading it, so at stage 3 rank 0 loads it and sends each rank its shards.

        Raises:
            UserError: DeepSpeed refuses the config, or has no fp16 on this device.
        """
        self.world = world
        self.config = config
        # On CPUs DeepSpeed compiles this C++ extension when it joins the group, for inference only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist.get_backend())  # takes over the group that world joined
        # Drop hpZ's groups of an earlier engine in this process: DeepSpeed would use them again.
        deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        try:
            DeepSpeedConfig(config)
        except ValueError as error:  # pydantic's errors are ValueErrors too
            reason = " ".join(str(error).splitlines()[:3])
            raise UserError(f"DeepSpeed refuses the --ds_config: {reason}") from error
        self.stage = int(config.get("zero_optimization", {}).get("stage", 0))
        self.keeps_whole_weights = self.stage < 3
        self.loads_on_rank_0 = quantized and self.stage == 3
        self.dtype, self.gradient_dtype = compute_dtype(config), gradient_dtype(config)
        if self.dtype not in get_accelerator().supported_dtypes():
            raise UserError("DeepSpeed has no fp16 on this device: set --bf16 or neither")

    @contextmanager
    def loading(self) -> Iterator[None]:
        if self.loads_on_rank_0:
            yield
            return
        # While this object lives, transformers shards each model that it loads.
        keep = HfDeepSpeedConfig(self.config)
        yield
        del keep

    def attach(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        make_optimizer: MakeOptimizer,
    ) -> None:
        if self.loads_on_rank_0:
            self._shard_from_rank_0(model)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(trainable)
        if self.stage == 3:
            _gather_wrapped_layers_whole(model, layers)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=list(trainable.values()),
            optimizer=self.optimizer,
            config=self.config,
        )
        self.module, self.model, self.adapted = self.engine, model, layers
        self.shards = ZERO_SHARDS[self.stage](self.engine)
        self.order_writes()

    def _shard_from_rank_0(self, model: nn.Module) -> None:
        """Shard ``model``, which only rank 0 has read, over all ranks, parameter by parameter."""
        match_rank_0(model, self.world)
        broadcast_buffers(model, dict(model.named_buffers()), self.world)
        parameters = replaced_parameters(model, self.world.device, keep=self.world.is_main)
        # DeepSpeed broadcasts each parameter from rank 0 and keeps this rank's shard.
        deepspeed.zero.Init(config_dict_or_path=self.config)._convert_to_zero_parameters(parameters)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # DeepSpeed divides gradients by the world size. Our loss is one share of a sum.
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)
        if not last:
            self.engine.step()
        elif self.shards.offloads:  # copies of gradients to the CPU may still be running
            get_accelerator().synchronize()

    def step(self) -> None:
        self._step()
        if not self.engine.was_step_applied():
            raise RuntimeError("DeepSpeed skipped a step that it should not have")

    def discard_step(self) -> None:
        if not self.shards.checks_overflow:
            self.engine.zero_grad()
            self.engine.micro_steps += 1
            return
        # An inf triggers DeepSpeed's own overflow path, which discards the complete step.
        for p in self.trained.values():
            self.shards.gradient(p).fill_(float("inf"))
        self._step()
        if self.engine.was_step_applied():
            raise RuntimeError("DeepSpeed applied a step that it should not have")

    def _step(self) -> None:
        """Run DeepSpeed's step after the last micro-batch, on gradients edited in place."""
        gradients = {p: self.shards.gradient(p) for p in self.trained.values()}
        self.shards.note_gradient_norms(gradients)
        self.engine.step()
        self.shards.drop_copies()
        self.shards.clear_gradients(list(gradients.values()))
        self.order_writes()

    def shape_of(self, p: ZeroParameter) -> torch.Size:
        # Under stage 3 a parameter's own shape is empty.
        return getattr(p, "ds_shape", p.shape)

    def release(self) -> None:
        self.shards.release()

    def order_writes(self) -> None:
        if (stream := self.shards.gather_stream) is not None:
            stream.wait_stream(get_accelerator().current_stream())

    @property
    def loss_scale(self) -> float:
        return float(self.engine.optimizer.loss_scale) if self.dtype == torch.float16 else 1.0

    def state(self) -> dict[str, Any]:
        state = super().state()
        if self.dtype == torch.float16:
            scaler = vars(self.engine.optimizer.loss_scaler)
            # Save the scale and its counters. The scaler's other values come from the options.
            state["loss_scaler"] = {k: v for k, v in scaler.items() if isinstance(v, int | float)}
        return state

    @contextmanager
    def writing(self) -> Iterator[None]:
        with super().writing():
            yield
            self.shards.refresh()

    @contextmanager
    def restoring(self, state: Mapping[str, Any]) -> Iterator[None]:
        if "loss_scaler" in state:
            vars(self.engine.optimizer.loss_scaler).update(state["loss_scaler"])
        with super().restoring(state):
            yield


def _gather_wrapped_layers_whole(model: Any, layers: Mapping[str, nn.Module]) -> None:
    """Make PEFT's wrapper layers leaves of ZeRO-3: their forward gathers all their parameters.

    Such a layer may read the wrapped weight outside the wrapped layer's forward (DoRA and HiRA do).
    """
    wrappers = {type(layer) for layer in layers.values() if adapted_linear(layer) is not layer}
    if wrappers:
        deepspeed.utils.set_z3_leaf_modules(model, sorted(wrappers, key=repr))
        # A leaf whose input needs no gradient would be freed before its backward.
        model.enable_input_require_grads()
