"""Reads the tensors of a checkpoint: a rank's parts, or full ones joined from all files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scalora_dist.checkpoint.index import Index, Piece, open_index, rank_file
from scalora_dist.checkpoint.manifest import INDEX
from scalora_dist.checkpoint.parts import FlatPart
from scalora_dist.core.split_precision import join_halves
from scalora_dist.errors import UserError
from scalora_dist.model_io.safetensors_writer import DTYPES

LOW = ".low"  # ends the name of the low halves of a tensor


def fill(folder: Path, index: Index, parts: Mapping[str, FlatPart]) -> None:
    """Read this rank's parts from a sound checkpoint, one file after another.

    Args:
        index: the checkpoint's index, which has all of ``parts``.

    Raises:
        UserError: a tensor has another size in the checkpoint.
    """
    wanted: dict[int, list[tuple[str, Piece]]] = defaultdict(list)
    for name, part in parts.items():
        check_size(folder, index, name, part.numel)
        for piece in index.pieces(name, part.offset, part.offset + part.local.numel()):
            wanted[piece.rank].append((name, piece))
    for rank, pieces in sorted(wanted.items()):
        with safe_open(rank_file(folder, rank), framework="pt") as file:
            for name, piece in pieces:
                _copy_piece(_opened(file, name, piece), piece, parts[name])


def _opened(file: Any, name: str, piece: Piece) -> Any:
    """A tensor of an open file, of which slices can be read.

    Raises:
        UserError: it is not the piece that the index names.
    """
    with suppress(SafetensorError):  # it has no such tensor
        saved = file.get_slice(name)
        if saved.get_shape() == [piece.end - piece.start]:
            return saved
    raise UserError(f"{INDEX} of a checkpoint does not fit its files: {name} of rank {piece.rank}")


def _copy_piece(saved: Any, piece: Piece, part: FlatPart) -> None:
    """Copy what a piece, ``saved``, and a part have in common."""
    first = max(part.offset, piece.start)
    end = min(part.offset + part.local.numel(), piece.end)
    values = saved[first - piece.start : end - piece.start]
    part.local[first - part.offset : end - part.offset].copy_(values)


def check_size(folder: Path, index: Index, name: str, numel: int) -> None:
    """Check that a tensor of a checkpoint has ``numel`` elements.

    Raises:
        UserError: it has not.
    """
    if (saved := index.tensors[name].numel) != numel:
        raise UserError(
            f"{folder} holds {saved} elements of {name}, which has {numel} here: it is of another "
            "model than --model_name_or_path"
        )


class CheckpointTensors:
    """The tensors of a sound checkpoint, by name. A file is opened once, a tensor read when asked.

    The engine and the number of ranks that wrote the checkpoint do not matter.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: its index cannot be read.
        """
        self.folder = folder
        self.index = open_index(folder)
        self._files: dict[int, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.index.tensors

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype that a tensor is saved in; None: the checkpoint does not hold it."""
        return DTYPES[self.index.tensors[name].dtype] if name in self else None

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """A full tensor on the CPU: float32 if it has low halves (then exact), else as it is saved.

        Raises:
            UserError: the saved tensor has not the size of this shape.
        """
        whole = self._joined(name, shape.numel())
        if name + LOW in self:
            whole = join_halves(whole, self._joined(name + LOW, shape.numel()))
        return whole.view(shape)

    def _joined(self, name: str, numel: int) -> Tensor:
        check_size(self.folder, self.index, name, numel)
        pieces = list(self.index.pieces(name, 0, numel))
        if len(pieces) == 1:
            return _opened(self._file(pieces[0].rank), name, pieces[0])[:]
        whole = torch.empty(numel, dtype=self.dtype(name))
        for piece in pieces:
            whole[piece.start : piece.end] = _opened(self._file(piece.rank), name, piece)[:]
        return whole

    def _file(self, rank: int) -> Any:
        if rank not in self._files:
            self._files[rank] = safe_open(rank_file(self.folder, rank), framework="pt")
        return self._files[rank]
