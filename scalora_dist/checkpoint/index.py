"""Which rank's file holds which range of each tensor of a checkpoint.

A resume would otherwise have to read the headers of all files on every rank. Tensors of one shape
are cut alike, so the index of a large model has few cuts: about one for each shape.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError
from numpy.typing import NDArray

from scalora_dist.checkpoint.manifest import INDEX
from scalora_dist.model_io.safetensors_writer import DTYPE_NAMES

# torch.distributed.checkpoint's names of the offsets in the header of a safetensors file.
SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
Facts = dict[str, tuple[str, int]]  # {tensor: (dtype as safetensors names it, elements)}
Row = tuple[int, int, int]  # a piece: its first element, its number of elements, its rank


class Entry(NamedTuple):
    """A tensor: its dtype as safetensors names it, its elements, its cut's place in ``cuts``."""

    dtype: str
    numel: int
    cut: int


class Cut(NamedTuple):
    """The pieces of a flat tensor in order: in whose file each is, and its first element.

    A piece ends where the next one begins, and the last one at the tensor's end.
    """

    ranks: tuple[int, ...]
    starts: tuple[int, ...]


class Piece(NamedTuple):
    """Elements ``[start, end)`` of a flat tensor, which are all that ``rank``'s file has of it."""

    rank: int
    start: int
    end: int


@dataclass(frozen=True)
class Index:
    """All tensors of a checkpoint, and where their pieces are.

    Attributes:
        tensors: {name: its dtype, size and cut}.
        cuts: the ways in which tensors are cut.
    """

    tensors: dict[str, Entry]
    cuts: list[Cut]

    @classmethod
    def of(cls, shared: Facts, ranges: Sequence[NDArray[np.int64]], own: Sequence[Facts]) -> Index:
        """The index of what all ranks save.

        Python's work is one operation for each tensor and a few for each rank.

        Args:
            shared: the tensors that all ranks know.
            ranges: of each rank (tensors, 2): the first element and the number of elements that it
                saves of each of ``shared``, in that order.
            own: of each rank the tensors that it alone knows, and saves in full.

        Raises:
            ValueError: a tensor is not saved once, in full.
        """
        made = _Collected()
        # (tensors, ranks, 2). Tensors that are cut alike have the same bytes.
        everyone = np.stack(list(ranges), axis=1)
        for (name, (dtype, numel)), held in zip(shared.items(), everyone, strict=True):
            made.add(name, dtype, numel, held.tobytes(), partial(_pieces_of, held))
        for rank, tensors in enumerate(own):
            for name, (dtype, numel) in tensors.items():
                whole = [(0, numel, rank)]
                made.add(name, dtype, numel, rank, whole.copy)
        return cls(made.tensors, made.cuts)

    @classmethod
    def of_headers(cls, folder: Path) -> Index:
        """The index of a checkpoint that has none: from the headers of all its files.

        Raises:
            ValueError: a header cannot be read, or a tensor is not there in full.
        """
        dtypes: dict[str, str] = {}
        rows: dict[str, list[Row]] = defaultdict(list)
        for rank in ranks_with_files(folder):
            file = rank_file(folder, rank)
            try:
                header = parse_local_safetensors_file_metadata(file)
                offsets = json.loads(header.metadata[SHARDING])
                for name, tensor in header.tensors.items():
                    (start,), (size,) = offsets[name][OFFSETS], tensor.shape
                    dtypes[name] = tensor.dtype
                    rows[name].append((start, size, rank))
            except (OSError, SafetensorsParsingError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file.name} has no readable header") from error
        made = _Collected()
        for name, pieces in rows.items():
            numel = sum(size for _, size, _ in pieces)
            made.add(name, dtypes[name], numel, tuple(pieces), pieces.copy)
        return cls(made.tensors, made.cuts)

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index of a checkpoint, from its file, or from all headers where it has none.

        Raises:
            ValueError: a clause that says what cannot be read.
        """
        try:
            text = (folder / INDEX).read_bytes()
        except FileNotFoundError:
            return cls.of_headers(folder)
        try:
            return cls.decode(text)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{INDEX} cannot be read") from error

    def encode(self) -> bytes:
        """The contents of index.json."""
        contents = {"tensors": self.tensors, "cuts": self.cuts}
        return json.dumps(contents, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, text: str | bytes) -> Index:
        """The index of the contents of index.json.

        Raises:
            ValueError, TypeError, KeyError or AttributeError: they are none.
        """
        contents = json.loads(text)
        tensors = {name: Entry(*entry) for name, entry in contents["tensors"].items()}
        cuts = [Cut(tuple(ranks), tuple(starts)) for ranks, starts in contents["cuts"]]
        known = (x.dtype in DTYPES and 0 <= x.cut < len(cuts) for x in tensors.values())
        if not all(known):
            raise ValueError("it has unknown dtypes or cuts")
        return cls(tensors, cuts)

    def pieces(self, name: str, start: int, end: int) -> Iterator[Piece]:
        """The pieces that hold elements ``[start, end)`` of a tensor, in order."""
        _, numel, cut = self.tensors[name]
        ranks, starts = self.cuts[cut]
        place = max(bisect_right(starts, start) - 1, 0)
        while start < end and place < len(starts) and starts[place] < end:
            last = starts[place + 1] if place + 1 < len(starts) else numel
            yield Piece(ranks[place], starts[place], last)
            place += 1


class _Collected:
    """The entries and cuts of an index that is being made."""

    def __init__(self) -> None:
        self.tensors: dict[str, Entry] = {}
        self.cuts: list[Cut] = []
        self._known: dict[Hashable, int] = {}

    def add(
        self, name: str, dtype: str, numel: int, key: Hashable, pieces: Callable[[], list[Row]]
    ) -> None:
        """Add a tensor.

        Args:
            key: the same for all tensors of that size that are cut alike.
            pieces: returns the pieces in any order. Called for the first tensor of a key.

        Raises:
            ValueError: the pieces do not cover the tensor, or do so twice.
        """
        place = self._known.setdefault((numel, key), len(self.cuts))
        if place == len(self.cuts):
            rows, end = sorted(pieces()), 0
            for start, size, _ in rows:
                if start != end:
                    raise ValueError(f"the ranks' parts of {name} do not follow one another")
                end += size
            if end != numel:
                raise ValueError(f"the ranks' parts of {name} have {end} of its {numel} elements")
            self.cuts.append(Cut(tuple(row[2] for row in rows), tuple(row[0] for row in rows)))
        self.tensors[name] = Entry(dtype, numel, place)


def _pieces_of(ranges: NDArray[np.int64]) -> list[Row]:
    """The pieces that are not empty, of all ranks' (start, size) of a tensor."""
    holding = ranges[:, 1].nonzero()[0]
    return [
        (start, size, rank)
        for (start, size), rank in zip(ranges[holding].tolist(), holding.tolist(), strict=True)
    ]


def rank_file(folder: Path, rank: int) -> Path:
    """The file that a rank writes."""
    return folder / f"rank-{rank:05d}.safetensors"


def ranks_with_files(folder: Path) -> list[int]:
    """The ranks that have written a file into a checkpoint."""
    return sorted(
        int(path.stem.removeprefix("rank-")) for path in folder.glob("rank-*.safetensors")
    )
