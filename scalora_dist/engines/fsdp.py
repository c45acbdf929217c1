"""The FSDP2 engine: each parameter is a DTensor of complete rows, on a 1-D or hybrid 2-D mesh."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.distributed.world import World
from scalora_dist.engines.broadcast import (
    broadcast_buffers,
    broadcast_from_rank_0,
    match_rank_0,
    replaced_parameters,
)
from scalora_dist.engines.fsdp_config import FSDPConfig
from scalora_dist.engines.layer_shards import LayerShards, NamedShard, TrainedShard, as_matrix
from scalora_dist.engines.local import LocalEngine, TorchShards
from scalora_dist.layers.target_modules import decoder_blocks

logger = logging.getLogger(__name__)


class FSDPEngine(LocalEngine):
    """A model under FSDP2, with one group of parameters per decoder block and one for the rest.

    Rank 0 reads the model and sends each rank its rows.

    A and B are stored as sharded fp32 masters and gathered in ``param_dtype``. Frozen weights are
    stored in ``dtype``. On a 2-D mesh, each row of ranks shards the full model among its ranks, and
    all rows hold the same values. Grams are summed over one row, gradients over all ranks.

    FSDP lets the gathers of each forward wait for all work before it, so ``order_writes`` has
    nothing to do.
    """

    keeps_whole_weights = False
    loads_on_rank_0 = True

    def __init__(
        self, world: World, config: FSDPConfig, *, dtype: torch.dtype, max_grad_norm: float
    ) -> None:
        super().__init__(world, dtype=dtype, max_grad_norm=max_grad_norm)
        self.config = config
        names = ("replicate", "shard")[-len(config.mesh) :]
        self.mesh = init_device_mesh(world.device.type, tuple(config.mesh), mesh_dim_names=names)

    def place(self, model: nn.Module) -> None:
        """Shard ``model`` while it has no storage, then send each rank its part from rank 0.

        One broadcast per parameter and buffer.
        """
        match_rank_0(model, self.world)
        source = {name: p.detach() for name, p in model.named_parameters()}
        buffers = dict(model.named_buffers())
        for _ in replaced_parameters(model, "meta", keep=False):
            pass
        self._shard(model)
        model.to_empty(device="cpu" if self.config.cpu_offload else self.world.device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor)
                whole = broadcast_from_rank_0(source[name], self.world)
                part = distribute_tensor(whole, self.mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(part.to_local())
        # Buffers stay on the device, also if parameters are offloaded.
        broadcast_buffers(model, buffers, self.world)

    def _shard(self, model: nn.Module) -> None:
        config, on_gpu = self.config, self.world.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=on_gpu) if config.cpu_offload else OffloadPolicy()
        policy = MixedPrecisionPolicy(config.param_dtype, config.reduce_dtype)
        # Blocks that no text reaches stay in the root's group: torch fails in the backward if a
        # separate group was never gathered.
        blocks = decoder_blocks(model)
        if not blocks:
            logger.warning("the model names no decoder blocks: FSDP gathers all of it at once")
        for module in (*blocks.values(), model):
            sharded = fully_shard(
                module,
                mesh=self.mesh,
                # Parameters outside the blocks are needed at both ends of a step, so they stay
                # gathered in between.
                reshard_after_forward=config.reshard_after_forward if module is not model else None,
                mp_policy=policy,
                offload_policy=offload,
            )
            # Each rank's loss is a share of a sum, so gradients are summed.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)

    def make_shards(self) -> TorchShards:
        return DTensorShards(self.optimizer, self.mesh)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        loss.backward()

    def layer_shards(self, *, gradients: bool = True) -> list[LayerShards]:
        self.release()
        return super().layer_shards(gradients=gradients)

    def trained_shards(self, *, gradients: bool = True) -> list[TrainedShard]:
        self.release()
        return super().trained_shards(gradients=gradients)

    def gradients(self) -> list[FlatShard]:
        self.release()
        return super().gradients()

    def base_shards(self) -> Iterator[NamedShard]:
        self.release()
        return super().base_shards()

    def added_shards(self) -> Iterator[NamedShard]:
        self.release()
        return super().added_shards()

    def release(self) -> None:
        # After an evaluation, parameters outside the blocks stay gathered. The shards would not be
        # visible.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class DTensorShards(TorchShards):
    """This rank's rows of each DTensor."""

    def __init__(self, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> None:
        super().__init__(optimizer)
        self.group = mesh.get_group(mesh.ndim - 1)

    def shard(self, tensor: Tensor) -> FlatShard:
        rows, cols = as_matrix(tensor.shape)
        share = ceil_div(rows, self.group.size())  # FSDP splits rows like torch.chunk
        start = min(self.group.rank() * share, rows)
        return FlatShard(self.local(tensor), start * cols, (rows, cols), self.group)

    def local(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        return tensor.to_local().detach().view(-1)
