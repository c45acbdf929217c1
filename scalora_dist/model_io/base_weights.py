"""Reads a base model's weights from its files again, as training loads them, a tensor at a time."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from scalora_dist.config.model import ModelArguments
from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError
from scalora_dist.layers.fourbit_linear import FourBitLinear
from scalora_dist.modeling.base_files import BaseFiles
from scalora_dist.modeling.conversions import Conversions, Group
from scalora_dist.modeling.load import outline


class BaseWeights:
    """The parameters and persistent buffers of a base model, with their values from its files.

    Attributes:
        args: the model's options.
        dtype: dtype of the training.
        model: the model, without storage.
    """

    def __init__(self, args: ModelArguments, dtype: torch.dtype) -> None:
        """
        Raises:
            UserError: the model's config cannot be read.
        """
        self.args = args
        self.dtype = dtype
        self.model = outline(args, dtype)
        self._read: tuple[Group | None, dict[str, Tensor]] = (None, {})

    @cached_property
    def files(self) -> BaseFiles:
        """The model's files, opened when they are first asked for.

        Raises:
            UserError: they cannot be read.
        """
        try:
            return BaseFiles(self.args, getattr(self.model.config, "transformers_weights", None))
        except (OSError, ValueError, RuntimeError) as error:
            raise self.refuse(str(error).strip().splitlines()[0]) from error

    @cached_property
    def conversions(self) -> Conversions:
        """How the tensors in the files become those in memory."""
        return Conversions(self.model, self.files.outlines)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """{name in memory: a meta tensor of its shape and its dtype in memory}: what is saved.

        Of tied weights, one.
        """
        untie(self.model, self.untied)
        return saved_state(self.model, self.dtype)

    @cached_property
    def untied(self) -> list[str]:
        """Weights that the config ties to others, and that the files hold with other values.

        ``from_pretrained`` does not tie them. It compares them in the dtype of the training.
        """
        loads, dtype = self.conversions.loads, None if self.quantized_before else self.dtype
        found = []
        for target, source in self.model.get_expanded_tied_weights_keys(all_submodels=True).items():
            if target in loads and source in loads:
                first, second = (self._convert(loads[x], dtype)[x] for x in (target, source))
                if not torch.equal(first, second):
                    found.append(target)
        return found

    @cached_property
    def quantized_before(self) -> bool:
        """Whether the files have weights in 4 bits. Then all others are loaded in their dtype."""
        return any(".quant_state." in key for key in self.files.outlines)

    @cached_property
    def _tied(self) -> dict[str, list[str]]:
        """{name of a parameter: all its names}."""
        names = defaultdict(list)
        self.state  # noqa: B018 - decides what is tied
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names[id(parameter)].append(name)
        return {name: same for same in names.values() for name in same}

    def opened(self) -> BaseWeights:
        """Itself, once its files are found and their headers are read.

        Raises:
            UserError: they cannot be read.
        """
        self.conversions  # noqa: B018 - opens the files
        self.state  # noqa: B018 - reads what may be tied
        return self

    @cached_property
    def names(self) -> frozenset[str]:
        """All names of all parameters."""
        self.state  # noqa: B018 - decides what is tied
        return frozenset(dict(self.model.named_parameters(remove_duplicate=False)))

    def has(self, name: str) -> bool:
        """Whether the files have a parameter or buffer."""
        return self.one_of(name, self.conversions.loads) is not None

    def one_of(self, name: str, known: Container[str]) -> str | None:
        """The name in ``known`` of the parameter ``name``. Tied parameters have several names."""
        return next((each for each in self._tied.get(name, [name]) if each in known), None)

    def read(self, name: str) -> Tensor:
        """A parameter or buffer in ``state``, on the CPU, as training loads it.

        What is made with it is kept until a tensor of another group is read.

        Raises:
            UserError: it is not in the files.
        """
        group, name = self._group(name)
        if group is not self._read[0]:
            self._read = (None, {})  # free what is there
            self._read = group, self._convert(group, self._dtype(group))
        return self._read[1][name]

    def _convert(self, group: Group, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """{name: tensor} that a group makes of the files.

        Args:
            dtype: dtype that the files' tensors are cast to first; None: their own.
        """
        sources = {key: self.files.read(key).to(dtype=dtype) for key in group.sources}
        return dict(zip(group.results, group.make(sources, self.model), strict=True))

    def quantized(self, name: str, layer: FourBitLinear) -> FourBitLinear:
        """A weight as training has it in 4 bits: quantized now, or in the files. On the CPU.

        Args:
            name: name of the weight (m, n).
            layer: the layer in the trained model, which may have no storage.
        """
        m, n = layer.out_features, layer.in_features
        linear = nn.Linear(n, m, bias=False, device="meta")
        key = next(iter(self._group(name)[0].sources))
        saved = [each for each in self.files.outlines if each.startswith(f"{key}.")]
        if saved:
            tensors = {each.removeprefix(f"{key}."): self.files.read(each) for each in saved}
            return FourBitLinear.saved(linear, layer.fourbit, self.files.read(key), tensors)
        linear.weight = nn.Parameter(self.read(name), requires_grad=False)
        return FourBitLinear.quantize(linear, layer.fourbit)

    def range(self, name: str, shard: FlatShard) -> Tensor:
        """The values in the range of ``shard``, 1-D float32 on its device. Local.

        Args:
            name: name of the weight (m, n).
            shard: this rank's shard of it.
        """
        return self._elements(name, shard, shard.local.numel()).to(shard.local.device)

    def check(self, loaded: Mapping[str, FlatShard], world: World) -> None:
        """Compare a row of some weights with the loaded model. One all-reduce.

        Args:
            loaded: {name of a weight (m, n): this rank's shard}, not changed since loading.
            world: the ranks.

        Raises:
            UserError: on every rank, if a weight is not in the files, or differs.
        """
        others = [self._differs(name, shard) for name, shard in loaded.items()]
        for name, differs in zip(loaded, world.max(*others), strict=True):
            if differs:
                raise self._refuse_other(name)

    def check_here(self, loaded: Mapping[str, FlatShard]) -> None:
        """As ``check``, of this rank's shards alone. Local.

        Raises:
            UserError: a weight is not in the files, or differs.
        """
        for name, shard in loaded.items():
            if self._differs(name, shard):
                raise self._refuse_other(name)

    def _group(self, name: str) -> tuple[Group, str]:
        """The group that makes a tensor, and the tensor's name in it."""
        found = self.one_of(name, self.conversions.loads)
        if found is None:
            raise self.refuse(f"its files have no {name}")
        return self.conversions.loads[found], found

    def _dtype(self, group: Group) -> torch.dtype | None:
        """The dtype that transformers casts the sources to: that of the first result."""
        if self.quantized_before:
            return None
        first = self.one_of(next(iter(group.results)), self.state)
        return self.state[first].dtype if first else self.dtype

    def _elements(self, name: str, shard: FlatShard, count: int) -> Tensor:
        """The first ``count`` elements of the shard's range, 1-D float32 on the CPU."""
        if not count:
            return torch.empty(0)
        first, start = divmod(shard.offset, shard.shape[1])
        rows = slice(first, ceil_div(shard.offset + count, shard.shape[1]))
        group, _ = self._group(name)
        if group.converter is None:  # a range of the file
            (key,) = group.sources
            values = self.files.read(key, rows).to(dtype=self._dtype(group))
        else:
            values = self.read(name)[rows]
        return values.float().reshape(-1)[start : start + count]

    def _differs(self, name: str, shard: FlatShard) -> bool:
        group, found = self._group(name)
        if tuple(group.results[found].shape) != shard.shape:
            return True
        count = min(shard.local.numel(), shard.shape[1])
        mine = shard.local[:count].float().cpu()
        return not torch.equal(self._elements(name, shard, count), mine)

    def _refuse_other(self, name: str) -> UserError:
        return self.refuse(f"its files hold another {name} than was loaded")

    def refuse(self, reason: str) -> UserError:
        """The error of a base model that cannot be read again for what a run leaves."""
        return UserError(
            f"--model_name_or_path {self.args.model_name_or_path} is read again after training, "
            f"and {reason}: save the model with save_pretrained"
        )


def untie(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Give these weights of a model without storage parameters of their own."""
    for name in names:
        holder, _, attribute = name.rpartition(".")
        alone = nn.Parameter(torch.empty_like(model.get_parameter(name)))
        setattr(model.get_submodule(holder), attribute, alone)


def saved_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """What ``save_pretrained`` saves of a model, by the names in memory.

    Args:
        model: the model, without storage.
        dtype: dtype that it is loaded in. Some families keep a few tensors in float32.

    Returns:
        {name: a meta tensor of its shape and dtype}. Of tied weights, one.
    """
    ignored = model._keys_to_ignore_on_save or ()
    patterns = [re.compile(x.replace("*", ".*")) for x in model._get_dtype_plan(dtype)]
    state = {}
    for name, tensor in model.state_dict().items():
        kept = any(pattern.search(name) for pattern in patterns)
        if name not in ignored:
            state[name] = tensor.to(torch.float32) if kept else tensor
    return remove_tied_weights_from_state_dict(state, model)
