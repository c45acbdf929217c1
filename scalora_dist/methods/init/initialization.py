"""The inputs of a method's initialization: the sharded model, options and a few samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scalora_dist.config.method import MethodArguments
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.sharded_svd import TruncatedSVD, truncated_svd
from scalora_dist.engines.base import Engine
from scalora_dist.errors import UserError
from scalora_dist.layers.fourbit_linear import FourBitLinear
from scalora_dist.methods.init.gradients import rehearse, sizes_of, weight_gradients
from scalora_dist.methods.init.groups import Budget, group_layers
from scalora_dist.methods.init.room import free_room

logger = logging.getLogger(__name__)
MIB = 2**20


@dataclass(frozen=True)
class Initialization:
    """The inputs of a method's initialization, and the operations that these share.

    Attributes:
        engine: the sharded model.
        args: the options of the method.
        losses: one pass over this rank's share of the samples, as for ``weight_gradients``.
        longest: as ``losses``, for the longest of them only.
        learning_rate: the learning rate of the run, before its schedule.
        warmup_ratio: the share of the run's steps over which the learning rate rises.
        examples: number of examples that the run trains on, with repeats.
        seed: the seed of the run.
    """

    engine: Engine
    args: MethodArguments
    losses: Callable[[], Iterable[Tensor]]
    longest: Callable[[], Iterable[Tensor]]
    learning_rate: float
    warmup_ratio: float
    examples: float
    seed: int

    def gradients(self) -> Iterator[tuple[str, FlatShard]]:
        """(layer, this rank's rows of ∇W) of each layer, from ``weight_gradients``. A collective.

        Raises:
            UserError: on every rank, where a gradient is not finite.
        """
        engine = self.engine
        gradients = weight_gradients(
            engine.model,
            engine.adapted,
            self.losses,
            engine.world,
            release=engine.release,
            budget=self._budget(),
            loss_scale=engine.loss_scale,
        )
        for name, gradient in gradients:
            (broken,) = engine.world.max((~gradient.local.isfinite()).any())
            if broken:
                raise UserError(
                    f"the first gradient of {name} is not finite: set --bf16, or with fp16 a lower "
                    "initial_scale_power in the --ds_config"
                )
            yield name, gradient
        if engine.world.device.type == "cuda":
            torch.cuda.empty_cache()  # NCCL and others do not allocate from torch's memory

    def _budget(self) -> Budget:
        """The memory for the sums of ∇W, the same on every rank. Rank 0 logs it. A collective."""
        engine = self.engine
        one = partial(
            rehearse,
            engine.model,
            engine.adapted,
            self.longest,
            engine.world,
            release=engine.release,
            loss_scale=engine.loss_scale,
        )
        budget = free_room(one, engine.world)
        if self.args.start_memory is not None:
            budget = budget.at_most(self.args.start_memory * MIB)
        sizes = sizes_of(engine.adapted, engine.world)
        logger.info(
            "the first gradients take %d MiB of a rank, which has %d MiB on the GPU and %d MiB on "
            "the host for them: %d pass(es) over the samples",
            sum(sizes.values()) // MIB,
            budget.device // MIB,
            budget.host // MIB,
            len(group_layers(sizes, budget)),
        )
        return budget

    def svd(self, matrix: FlatShard, rank: int) -> TruncatedSVD:
        """``truncated_svd`` plus broadcasts, so that all ranks have the same bits. A collective.

        This includes the replicas of a device mesh.
        """
        device = self.engine.world.device
        svd = truncated_svd(matrix, rank, device=device, seed=self.seed)
        return TruncatedSVD(*(self.engine.world.from_rank_0(part) for part in svd))

    def weights(self) -> dict[str, FlatShard]:
        """{layer: this rank's shard of W}, in model order. A 4-bit W is dequantized to float32."""
        shards = {p.name: p.shard for p in self.engine.base_shards()}
        weights = {}
        for name, layer in self.engine.adapted.items():
            codes = weights[name] = shards[f"{name}.weight"]
            if isinstance(layer, FourBitLinear):
                weights[name] = layer.dense_shard(codes)
        return weights

    def added(self) -> dict[str, FlatShard]:
        """{parameter: this rank's shard of it} for the parameters that the method added."""
        return {p.name: p.shard for p in self.engine.added_shards()}
