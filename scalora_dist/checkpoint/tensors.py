"""Reads the tensors of a checkpoint in one process, each joined from the parts of all ranks."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

from scalora_dist.core.split_precision import join_halves
from scalora_dist.errors import UserError

LOW = ".low"  # ends the name of the low halves of a tensor


class _Part(NamedTuple):
    """A part of a flat tensor: its first element, its number of elements, its file."""

    start: int
    size: int
    file: Any


class CheckpointTensors:
    """The tensors of a sound checkpoint, by name. A file is opened once, a tensor read when asked.

    The engine and the number of ranks that wrote the checkpoint do not matter.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: dict[str, list[_Part]] = defaultdict(list)
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            offsets = json.loads((file.metadata() or {}).get(CUSTOM_METADATA_KEY, "{}"))
            for name in file.keys():  # noqa: SIM118
                (start,) = offsets[name][SAVED_OFFSETS_KEY]
                (count,) = file.get_slice(name).get_shape()
                self._parts[name].append(_Part(start, count, file))

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype that a tensor is saved in; None: the checkpoint does not hold it."""
        if name not in self:
            return None
        return self._parts[name][0].file.get_slice(name)[:0].dtype

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """A full tensor on the CPU: float32 if it has low halves (then exact), else as it is saved.

        Raises:
            UserError: its parts are not those of a tensor of this shape.
        """
        whole = self._joined(name, shape.numel())
        if name + LOW in self:
            whole = join_halves(whole, self._joined(name + LOW, shape.numel()))
        return whole.view(shape)

    def _joined(self, name: str, numel: int) -> Tensor:
        parts = sorted(self._parts[name], key=lambda part: part.start)
        if len(parts) == 1 and parts[0].size == numel:
            return parts[0].file.get_tensor(name)
        whole, end = None, 0
        for part in parts:
            values = part.file.get_tensor(name)
            if whole is None:
                whole = torch.empty(numel, dtype=values.dtype)
            if part.start != end or end + part.size > numel:
                break
            whole[end : end + part.size] = values
            end += part.size
        if whole is None or end != numel:
            raise UserError(
                f"{self.folder} holds {end} of the {numel} elements of {name}: it is of another "
                "model than --model_name_or_path"
            )
        return whole
