"""Where DeepSpeed keeps a rank's part of weights, gradients, masters and moments: ZeRO 0 to 3.

Private attributes of DeepSpeed as in ``engines/deepspeed.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, TypeAlias

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.engines.base import MOMENTS, ParameterShards
from scalora_dist.engines.layer_shards import as_matrix

ZeroParameter: TypeAlias = Any  # an nn.Parameter with DeepSpeed's own attributes


class ZeroShards(ParameterShards):
    """Finds this rank's part of a parameter under one ZeRO stage.

    Attributes:
        engine: DeepSpeed's engine.
        zero: DeepSpeed's optimizer wrapper of this stage.
        offloads: whether the optimizer state is offloaded.
        gather_stream: the device's stream that gathers weights, where it is not the current one.
            DeepSpeed lets it wait for no other, and fills it while the step before is still
            computed. None on CPUs, and below stage 3.
    """

    checks_overflow = True  # DeepSpeed's step discards non-finite gradients by itself
    gather_stream: Any = None

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        super().__init__(engine.basic_optimizer)
        self.engine = engine
        self.zero = engine.optimizer
        offload = engine.zero_offload_optimizer()
        self.offloads = offload is not None and str(offload.device) not in ("none", "None")

    def weight(self, p: ZeroParameter) -> FlatShard:
        """This rank's shard of a frozen weight. Below stage 3, every rank has all of it."""
        return FlatShard(p.data.view(-1), 0, as_matrix(p.shape))

    @abstractmethod
    def refresh(self) -> None:
        """Make the forward read the values that were written into masters and frozen weights."""

    def release(self) -> None:
        """Free gathered weights after a backward that was not run by DeepSpeed's engine."""

    def drop_copies(self) -> None:
        """Drop DeepSpeed's copies of the weights, so that the next forward reads the shards."""

    def note_gradient_norms(self, gradients: Mapping[ZeroParameter, Tensor]) -> None:
        """Update the norms that DeepSpeed took in the backward.

        With optimizer offload DeepSpeed clips by these norms, and the gradients were edited since.
        """
        if not self.offloads:
            return
        held = {p: gradient for p, gradient in gradients.items() if gradient.numel()}
        if not held:
            return
        norms = torch.stack(torch._foreach_norm(list(held.values()), 2, torch.float64))
        for p, norm in zip(held, norms.float(), strict=True):
            self.zero.norm_for_param_grads[self.zero.get_param_id(p)] = norm

    def clear_gradients(self, gradients: list[Tensor]) -> None:
        """Zero the gradient buffers, which a stage keeps from step to step.

        If the next forward does not reach a layer, the optimizer would step that layer with this
        step's gradients, or with the inf of a discarded step.
        """
        # What a rank does not hold is empty, and may have another dtype.
        if held := [gradient for gradient in gradients if gradient.numel()]:
            torch._foreach_zero_(held)


class Stage0Shards(ZeroShards):
    """Stage 0: every rank has all of every tensor."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        super().__init__(engine)
        self.masters: dict[ZeroParameter, ZeroParameter] = {}
        self.checks_overflow = hasattr(self.zero, "fp16_groups")
        if self.checks_overflow:  # 16-bit: FP16_UnfusedOptimizer
            for low, high in zip(self.zero.fp16_groups, self.zero.fp32_groups, strict=True):
                self.masters |= dict(zip(low, high, strict=True))
            # Its constructor takes a dummy step. Adam's bias correction would be one step off.
            for state in self.zero.optimizer.state.values():
                state["step"].zero_()

    def _master(self, p: ZeroParameter) -> ZeroParameter:
        return self.masters.get(p, p)

    def refresh(self) -> None:
        if self.masters:
            torch._foreach_copy_(
                [low.data for low in self.masters], [high.data for high in self.masters.values()]
            )

    def master(self, p: ZeroParameter) -> FlatShard:
        return FlatShard(self._master(p).data.view(-1), 0, as_matrix(p.shape))

    def gradient(self, p: ZeroParameter) -> Tensor:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        return p.grad

    def moments(self, p: ZeroParameter) -> list[Tensor]:
        state = self.optimizer.state.get(self._master(p), {})
        return [state[key].view(-1) for key in MOMENTS if key in state]


class Stage1And2Shards(ZeroShards):
    """Stages 1 and 2: pieces of one flattened buffer, which may begin and end inside a row."""

    def _nothing(self) -> Tensor:
        """An empty part of a parameter of which this rank owns nothing, on the masters' device."""
        return self.zero.single_partition_of_fp32_groups[0].new_empty(0)

    def refresh(self) -> None:
        self.zero.update_lp_params()

    def master(self, p: ZeroParameter) -> FlatShard:
        mapping = p._hp_mapping
        if mapping is None:
            return FlatShard(self._nothing(), 0, as_matrix(p.shape), dist.group.WORLD)
        start = mapping.lp_fragment_address.start
        return FlatShard(mapping.hp_fragment.view(-1), start, as_matrix(p.shape), dist.group.WORLD)

    def gradient(self, p: ZeroParameter) -> Tensor:
        if p._hp_mapping is None:
            return self._nothing()
        return p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group)

    def clear_gradients(self, gradients: list[Tensor]) -> None:
        super().clear_gradients(gradients)
        if self.offloads:  # DeepSpeed keeps the fp32 sums of a discarded step on the device
            self.zero.averaged_gradients.clear()

    def moments(self, p: ZeroParameter) -> list[Tensor]:
        mapping = p._hp_mapping
        if mapping is None:  # as many moments as on the ranks that own a part
            states = self.zero.optimizer.state.values()
            return [self._nothing() for key in MOMENTS if any(key in state for state in states)]
        flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        state = self.zero.optimizer.state.get(flat, {})
        address = mapping.hp_fragment_address
        return [
            state[key].view(-1).narrow(0, address.start, address.numel)
            for key in MOMENTS
            if key in state
        ]


class Stage3Shards(ZeroShards):
    """Stage 3: ceil(numel / world) elements of every parameter on each rank, the last padded."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        super().__init__(engine)
        self.index = {p: i for group in self.zero.fp16_groups for i, p in enumerate(group)}
        self.parameters = list(engine.module.parameters())
        self.gather_stream = self.zero.parameter_offload._DeepSpeedZeRoOffload__allgather_stream

    def _shard(self, p: ZeroParameter, local: Tensor) -> FlatShard:
        size = p.ds_tensor.ds_numel
        start = min(dist.get_rank() * size, p.ds_numel)
        length = min(size, p.ds_numel - start)
        return FlatShard(local.view(-1)[:length], start, as_matrix(p.ds_shape), dist.group.WORLD)

    def stepped(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def refresh(self) -> None:
        for group in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := self.zero.persistent_parameters:  # full copies with the old values
            persistent[0].partition(persistent)
            self._gather_persistent()
        self.drop_copies()

    @torch.no_grad()
    def release(self) -> None:
        offload = self.zero.parameter_offload
        # DeepSpeed's own backward ends with the first call; its step makes the other two.
        offload.release_backward_leftovers()
        offload.partition_all_parameters()
        self._gather_persistent()

    def drop_copies(self) -> None:
        """Drop hpZ's secondary shards, which hold one copy of the model in each group of ranks.

        DeepSpeed makes the secondary shard of a weight, if there is none yet, when it frees the
        gathered weight. While the shard exists, DeepSpeed gathers from it and not from the primary
        one. DeepSpeed's own step drops only those of trained parameters.
        """
        for parameter in self.parameters:
            parameter.ds_secondary_tensor = None

    def _gather_persistent(self) -> None:
        if persistent := self.zero.persistent_parameters:
            persistent[0].all_gather(persistent)

    def weight(self, p: ZeroParameter) -> FlatShard:
        return self._shard(p, p.ds_tensor.data)

    def _position(self, p: ZeroParameter) -> tuple[int, int, int]:
        return self.zero.grad_position[self.zero.get_param_id(p)]

    def master(self, p: ZeroParameter) -> FlatShard:
        group, offset, numel = self._position(p)
        return self._shard(
            p, self.zero.fp32_partitioned_groups_flat[group].data.narrow(0, offset, numel)
        )

    def gradient(self, p: ZeroParameter) -> Tensor:
        group, offset, numel = self._position(p)
        if self.offloads:
            local = self.zero.fp32_partitioned_groups_flat[group].grad.narrow(0, offset, numel)
        else:
            local = self.zero.averaged_gradients[group][self.index[p]]
        return self._shard(p, local).local

    def clear_gradients(self, gradients: list[Tensor]) -> None:
        super().clear_gradients(gradients)
        if self.offloads:  # the gradients also went through this buffer
            self.zero.grad_partitions_flat_buffer.zero_()

    def moments(self, p: ZeroParameter) -> list[Tensor]:
        group, offset, numel = self._position(p)
        state = self.zero.optimizer.state.get(self.zero.fp32_partitioned_groups_flat[group], {})
        return [
            self._shard(p, state[key].narrow(0, offset, numel)).local
            for key in MOMENTS
            if key in state
        ]


ZERO_SHARDS: dict[int, type[ZeroShards]] = {
    0: Stage0Shards,
    1: Stage1And2Shards,
    2: Stage1And2Shards,
    3: Stage3Shards,
}
