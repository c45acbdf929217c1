"""The parameters of a trained model from a checkpoint and the base model's files, one at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from scalora_dist.checkpoint.tensors import CheckpointTensors
from scalora_dist.core.checksum import CHUNK, bits
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.engines.layer_shards import as_matrix
from scalora_dist.errors import UserError
from scalora_dist.layers.adapted_linear import own_parameters
from scalora_dist.layers.carry_linear import CarryLinear
from scalora_dist.layers.fourbit_linear import fourbit_weights
from scalora_dist.methods.carry import compression
from scalora_dist.model_io.base_weights import BaseWeights


class CheckpointParameters:
    """What is saved of a run, in full on one process. The attributes are those of ``Parameters``.

    What the checkpoint holds is read from it, the rest from the base model's files. Nothing is kept
    but the tensors that were made together with the last one.
    """

    rank, device = 0, torch.device("cpu")

    def __init__(
        self,
        model: PreTrainedModel,
        adapted: Mapping[str, nn.Module],
        tensors: CheckpointTensors,
        base: BaseWeights,
        *,
        used: Mapping[str, int],
        carry_rank: int,
    ) -> None:
        """
        Args:
            model: the model with the method's layers, without storage.
            adapted: {name: layer that the method adapts}, in model order.
            tensors: the checkpoint's tensors.
            base: the base model.
            used: {layer: number of filled columns of its carry}.
            carry_rank: R. Carries with more columns are compressed to it, as at a run's end.
        """
        self.adapted = adapted
        self.modules = dict(model.named_modules()).keys()
        self.tensors = tensors
        self.base = base
        self.used, self.carry_rank = used, carry_rank
        self._added = {
            f"{name}.{key}": p.shape
            for name, layer in adapted.items()
            for key, p in own_parameters(layer).items()
        }
        self._fourbit = fourbit_weights(model)
        self._compressed: tuple[str, dict[str, Tensor]] = ("", {})

    def check_base(self, checksum: str) -> None:
        """Check that the base model has the weights that the run began from. Reads all of them.

        Args:
            checksum: what ``checkpoint.run_state.fingerprint`` found at the run's start.

        Raises:
            UserError: it has others.
        """
        kept = cast = 0
        for name in tqdm(self.loaded, "checking the base model", disable=None, leave=False):
            if fourbit := self._fourbit.get(name):
                quantized = self.base.quantized(name, fourbit)
                codes = quantized.weight.detach().view(-1).view(torch.uint8)
                total = _sum(codes) + _sum(quantized.sizes)
                kept, cast = kept + total, cast + total
                continue
            values, dtype = self.base.read(name), self.tensors.dtype(name)
            kept += _sum(values.to(dtype or values.dtype))
            # Some engines cast the few weights too that a model keeps in float32.
            cast += _sum(values.to(dtype or self.base.dtype))
        if checksum not in (f"{total % 2**64:016x}" for total in (kept, cast)):
            raise UserError(
                f"{self.base.args.model_name_or_path} does not hold the weights that the run began "
                "from: name its base model with --model_name_or_path"
            )

    @cached_property
    def loaded(self) -> Collection[str]:
        """Names of the loaded model's parameters that the checkpoint or the base's files hold."""
        self.base.opened()  # decides which parameters are tied
        names = dict(self.base.model.named_parameters())
        return dict.fromkeys(x for x in names if x in self.tensors or self.base.has(x))

    def shape(self, name: str) -> torch.Size:
        if name in self._added:
            return self._added[name]
        return self.base.model.get_parameter(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Of a weight that the checkpoint does not hold, that of the loaded model."""
        return self.tensors.dtype(name) or self.base.state[name].dtype

    def shard(self, name: str) -> FlatShard:
        """The full parameter. A weight in 4 bits is dequantized to float32."""
        whole = self._read(name)
        return FlatShard(whole.reshape(-1), 0, as_matrix(whole.shape))

    def dense(self, name: str, shard: FlatShard) -> Tensor:
        return shard.local.view(self.shape(name))

    def _read(self, name: str) -> Tensor:
        layer, _, key = name.rpartition(".")
        if isinstance(self.adapted.get(layer), CarryLinear) and key in ("C", "D"):
            return self._carry(layer)[key]
        if name in self.tensors:
            return self.tensors.read(name, self.shape(name))
        if fourbit := self._fourbit.get(name):
            quantized = self.base.quantized(name, fourbit)
            return quantized.dense(quantized.weight, torch.float32)
        return self.base.read(name)

    def _carry(self, layer: str) -> dict[str, Tensor]:
        """C and D of a layer, float32. They have at most R columns that are not zero."""
        if self._compressed[0] != layer:
            C, D = (self.tensors.read(f"{layer}.{x}", self.shape(f"{layer}.{x}")) for x in "CD")
            if self.used.get(layer, 0) > self.carry_rank:
                wide = C.double(), D.double()
                gram_c, gram_d = (factor.T @ factor for factor in wide)
                done = compression(gram_c, gram_d, self.carry_rank)
                C, D = wide[0] @ done.on_C, wide[1] @ done.on_D
            self._compressed = layer, {"C": C.float(), "D": D.float()}
        return self._compressed[1]


def _sum(tensor: Tensor) -> int:
    """The sum of a tensor's bit patterns as integers. They are widened a chunk at a time."""
    return sum(int(x.sum(dtype=torch.int64)) for x in bits(tensor.reshape(-1)).split(CHUNK))
