"""PyTorch's FSDP2: each parameter a DTensor of whole rows, on a 1-D or a hybrid 2-D mesh."""

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
from transformers import PreTrainedModel

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
from scalora_dist.layers.target_modules import reached_by_text

logger = logging.getLogger(__name__)


class FSDPEngine(LocalEngine):
    """A model under FSDP2, one group of parameters per decoder block and one for the rest.

    Rank 0 reads it and sends each rank its rows.

    A and B are kept as fp32 masters (sharded) and gathered in ``param_dtype``; frozen weights are
    kept in ``dtype``. On a 2-D mesh every row of ranks holds the whole model cut up among them, and
    all rows hold the same: grams are summed over one row, gradients over all ranks.
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
        """Cut ``model`` up while it has no storage, then send each rank its part of rank 0's."""
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
        # On the device, even where parameters are not.
        broadcast_buffers(model, buffers, self.world)

    def _shard(self, model: nn.Module) -> None:
        config, on_gpu = self.config, self.world.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=on_gpu) if config.cpu_offload else OffloadPolicy()
        policy = MixedPrecisionPolicy(config.param_dtype, config.reduce_dtype)
        blocks = _decoder_blocks(model)
        if not blocks:
            logger.warning("the model names no decoder blocks: FSDP gathers all of it at once")
        for module in (*blocks, model):
            sharded = fully_shard(
                module,
                mesh=self.mesh,
                # What is outside the blocks is needed at both ends of a step: kept in between.
                reshard_after_forward=config.reshard_after_forward if module is not model else None,
                mp_policy=policy,
                offload_policy=offload,
            )
            # Our losses are shares of a sum, so gradients are summed.
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

    def base_shards(self) -> Iterator[NamedShard]:
        self.release()
        return super().base_shards()

    def added_shards(self) -> Iterator[NamedShard]:
        self.release()
        return super().added_shards()

    def release(self) -> None:
        # What is outside the blocks stays gathered after an evaluation, and so would be shown.
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
        share = ceil_div(rows, self.group.size())  # FSDP cuts as torch.chunk does
        start = min(self.group.rank() * share, rows)
        return FlatShard(self.local(tensor), start * cols, (rows, cols), self.group)

    def local(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        return tensor.to_local().detach().view(-1)


def _decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers never splits, in model order."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    # Blocks that text never comes through (vision towers) stay in the root's group: torch fails in
    # the backward where a group of its own was never gathered.
    reached = reached_by_text(model) if isinstance(model, PreTrainedModel) else set(model.modules())
    return [x for x in model.modules() if type(x).__name__ in names and x in reached]
