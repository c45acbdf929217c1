"""The files of a base model's weights: which tensors are in them, read one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file
from transformers.utils.hub import cached_files

from scalora_dist.config.model import ModelArguments
from scalora_dist.modeling.index_files import weight_map

# In the order in which transformers looks for them: a file, or the index of several.
NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class BaseFiles:
    """The tensors in a base model's files. They are opened once and read when they are asked for.

    Attributes:
        outlines: {key in the files: a meta tensor of its shape and dtype}.
    """

    def __init__(self, args: ModelArguments, weights: str | None = None) -> None:
        """Find the files, and read what is in them. A file of the hub is downloaded first.

        Args:
            args: the model's options.
            weights: name of the file, or of the index, that the model's config names.

        Raises:
            ValueError: there are no weights, a file is missing or damaged.
            OSError: a file cannot be read.
        """
        self.args = args
        self.outlines: dict[str, Tensor] = {}
        self._readers: dict[str, Any] = {}  # {key: an open file, or a dict of tensors}
        for path in weight_files(args, weights):
            try:
                self._open(path)
            except SafetensorError as error:
                raise ValueError(f"{path.name} is damaged: {error}") from error

    def read(self, key: str, rows: slice = slice(None)) -> Tensor:
        """A tensor, or some of its rows, on the CPU, in the file's dtype."""
        reader = self._readers[key]
        if isinstance(reader, dict):
            return reader[key][rows]
        if rows == slice(None):
            return reader.get_tensor(key)
        return reader.get_slice(key)[rows]

    def _open(self, path: Path) -> None:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                size = torch.Size(part.get_shape())
                self.outlines[key] = torch.empty(size, dtype=_dtype(part), device="meta")
                self._readers[key] = file
            return
        mmap = is_zipfile(path)  # torch < 1.6 wrote another format
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        for key, tensor in tensors.items():
            self.outlines[key] = torch.empty_like(tensor, device="meta")
            self._readers[key] = tensors


def weight_files(args: ModelArguments, weights: str | None = None) -> list[Path]:
    """The files of the weights on this machine. Those of the hub are downloaded first.

    Args:
        args: the model's options.
        weights: name of the file, or of the index, that the model's config names.

    Raises:
        ValueError: there are no weights, or a file is missing.
        OSError: a file cannot be read.
    """
    names = (weights,) if weights else NAMES
    for name in names:
        if not (found := base_file(args, name)):
            continue
        if not name.endswith(".json"):
            return [found]
        needed = sorted(set(weight_map(found).values()))
        cached_files(str(args.model_name_or_path), needed, **_given(args))  # downloads in parallel
        files = {file: base_file(args, file) for file in needed}
        if missing := [file for file, path in files.items() if path is None]:
            raise ValueError(f"{missing[0]} is missing")
        return [path for path in files.values() if path]
    raise ValueError(f"it has none of {', '.join(names)}")


def base_file(args: ModelArguments, name: str) -> Path | None:
    """A file of the base model on this machine. None: the model has no such file."""
    path = cached_file(str(args.model_name_or_path), name, **_given(args))
    return path and Path(path)


def _given(args: ModelArguments) -> dict[str, Any]:
    return {
        "revision": args.model_revision,
        "_raise_exceptions_for_missing_entries": False,
    }


def _dtype(part: Any) -> torch.dtype:
    """The dtype of a tensor in a safetensors file."""
    return part[:0].dtype if part.get_shape() else part[...].dtype
