"""Reads a base model's weights again from its safetensors files, each rank its own ranges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError
from scalora_dist.modeling.index_files import weight_map

ONE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class BaseWeights:
    """Reads parts of a model's matrices with their values from before training.

    Attributes:
        dtype: dtype that the values are rounded to, as in training.
        places: {parameter: (file, key in that file)}.
    """

    def __init__(
        self, model: str, loaded: Mapping[str, FlatShard], dtype: torch.dtype, world: World
    ) -> None:
        """Find the matrices, and compare one row of each with the loaded model. One all-reduce.

        Args:
            model: a folder or a hub name.
            loaded: {parameter: this rank's shard}, not changed since loading.
            dtype: dtype that the loaded weights were cast to.
            world: the ranks.

        Raises:
            UserError: on every rank, if a matrix is not found or differs from the loaded one.
        """
        self.dtype = dtype
        files = world.node_first(lambda: _files(model))
        self.locations: dict[str, tuple[str, str]] = {}
        for name in loaded:
            key = find_key(name, files)
            if key is None:
                raise _unreadable(model, f"its files have no {name}, or several")
            self.locations[name] = files[key], key
        others = [self._differs(name, shard) for name, shard in loaded.items()]
        for name, differs in zip(loaded, world.max(*others), strict=True):
            if differs:
                raise _unreadable(model, f"its files hold another {name} than was loaded")

    def range(self, name: str, shard: FlatShard) -> Tensor:
        """The original values of the range of ``shard``, 1-D float32 on its device. Local.

        Args:
            name: the parameter's name.
            shard: this rank's shard of it.
        """
        return self._read(name, shard, shard.local.numel()).to(shard.local.device)

    def _read(self, name: str, shard: FlatShard, count: int) -> Tensor:
        """The first ``count`` elements of the shard's range, 1-D float32 on the CPU."""
        if not count:
            return torch.empty(0)
        file, key = self.locations[name]
        cols = shard.shape[1]
        first, start = divmod(shard.offset, cols)
        with safe_open(file, framework="pt") as opened:
            rows = opened.get_slice(key)[first : ceil_div(shard.offset + count, cols)]
        return rows.to(self.dtype).float().view(-1)[start : start + count]

    def _differs(self, name: str, shard: FlatShard) -> bool:
        file, key = self.locations[name]
        with safe_open(file, framework="pt") as opened:
            if tuple(opened.get_slice(key).get_shape()) != shard.shape:
                return True
        count = min(shard.local.numel(), shard.shape[1])
        return not torch.equal(self._read(name, shard, count), shard.local[:count].float().cpu())


def _files(model: str) -> dict[str, str]:
    """The model's safetensors files, {key: path of the file that contains it}."""
    try:
        if one := _cached(model, ONE_FILE):
            with safe_open(one, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), one)
        if index := _cached(model, INDEX_FILE):
            keys = weight_map(Path(index))
            files = {file: _cached(model, file) for file in set(keys.values())}
            if missing := [file for file, path in files.items() if path is None]:
                raise _unreadable(model, f"{missing[0]} is missing")
            return {key: str(files[file]) for key, file in keys.items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(model, str(error).strip().splitlines()[0]) from error
    raise _unreadable(model, "it has no safetensors files")


def _cached(model: str, file: str) -> str | None:
    return cached_file(model, file, _raise_exceptions_for_missing_entries=False)


def find_key(name: str, files: Mapping[str, str]) -> str | None:
    """The key of a parameter in the files; None if there is none, or no unique one.

    A key may have another prefix than the parameter's name. So the only key that ends like the name
    is taken. If several do (a vision tower's keys can), the only one that consists of the same
    words is taken: Gemma 3's files have ``language_model.model.layers…`` for
    ``model.language_model.layers…``.

    Args:
        name: the parameter's name in the model.
        files: {key: path of the file that contains it}.
    """
    if name in files:
        return name
    rest = name
    while rest:
        found = [key for key in files if key == rest or key.endswith(f".{rest}")]
        if len(found) > 1:
            words = sorted(name.split("."))
            found = [key for key in found if sorted(key.split(".")) == words]
            return found[0] if len(found) == 1 else None
        if found:
            return found[0]
        rest = rest.partition(".")[2]
    return None


def _unreadable(model: str, reason: str) -> UserError:
    return UserError(
        f"--adapter_rank reads --model_name_or_path {model} again at the end, and {reason}: save "
        "the model with save_pretrained, or leave the option out"
    )
