"""Which rank's file holds which range of each tensor of a checkpoint.

A resume would otherwise have to read the headers of all files on every rank. Tensors of one shape
are cut alike, so the index of a large model has few cuts: about one for each shape.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError
from numpy.typing import NDArray

from scalora_dist.checkpoint.manifest import INDEX
from scalora_dist.errors import UserError
from scalora_dist.model_io.safetensors_writer import DTYPES

# torch.distributed.checkpoint's names of the offsets in the header of a safetensors file.
SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"

Facts = dict[str, tuple[str, int]]  # {tensor: (dtype as safetensors names it, elements)}
FILE = re.compile(r"rank-(\d{5,})\.safetensors")


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

    start: int
    end: int
    rank: int


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
        builder = _Builder()
        # (tensors, ranks, 2). Tensors that are cut alike have the same bytes.
        everyone = np.stack(list(ranges), axis=1)
        for (name, (dtype, numel)), held in zip(shared.items(), everyone, strict=True):
            key = held.tobytes(), numel
            if key not in builder.places:
                builder.add_cut(key, name, numel, _pieces_of(held))
            builder.add(name, dtype, numel, key)
        for rank, tensors in enumerate(own):
            for name, (dtype, numel) in tensors.items():
                whole = rank, numel
                if whole not in builder.places:
                    pieces = [Piece(0, numel, rank)] if numel else []
                    builder.add_cut(whole, name, numel, pieces)
                builder.add(name, dtype, numel, whole)
        return cls(builder.tensors, builder.cuts)

    @classmethod
    def of_headers(cls, folder: Path) -> Index:
        """The index of a checkpoint that has none: from the headers of all its files.

        Raises:
            ValueError: a header cannot be read, or a tensor is not there in full.
        """
        dtypes: dict[str, str] = {}
        found: dict[str, list[Piece]] = defaultdict(list)
        for rank in ranks_with_files(folder):
            file = rank_file(folder, rank)
            try:
                header = parse_local_safetensors_file_metadata(file)
                offsets = json.loads(header.metadata[SHARDING])
                for name, tensor in header.tensors.items():
                    (start,), (size,) = offsets[name][OFFSETS], tensor.shape
                    dtypes[name] = tensor.dtype
                    if size:
                        found[name].append(Piece(int(start), int(start) + int(size), rank))
                if not DTYPES.keys() >= {tensor.dtype for tensor in header.tensors.values()}:
                    raise ValueError("unknown dtypes")
            except (
                *(OSError, SafetensorsParsingError, ValueError),
                *(KeyError, TypeError, AttributeError),
            ) as error:
                raise ValueError(f"{file.name} has no readable header") from error
        builder = _Builder()
        for name, dtype in dtypes.items():
            key = tuple(sorted(found[name]))
            numel = key[-1].end if key else 0
            builder.add_cut(key, name, numel, key)
            builder.add(name, dtype, numel, key)
        return cls(builder.tensors, builder.cuts)

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
        except OSError as error:
            raise ValueError(f"{INDEX} cannot be read ({error.strerror})") from error
        try:
            return cls.decode(text)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise ValueError(f"{INDEX} cannot be read") from error

    def encode(self) -> bytes:
        """The contents of index.json."""
        contents = {"tensors": self.tensors, "cuts": self.cuts}
        return json.dumps(contents, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, text: str | bytes) -> Index:
        """The index of the contents of index.json.

        Raises:
            ValueError, TypeError, AttributeError or LookupError: they are none.
        """
        contents = json.loads(text)
        tensors = {name: Entry(*entry) for name, entry in contents["tensors"].items()}
        cuts = [Cut(tuple(ranks), tuple(starts)) for ranks, starts in contents["cuts"]]
        for cut, numel in {(entry.cut, entry.numel) for entry in tensors.values()}:
            if cut < 0 or not _covers(cuts[cut], numel):
                raise ValueError("the pieces of a tensor do not cover it")
        if not DTYPES.keys() >= {entry.dtype for entry in tensors.values()}:
            raise ValueError("a tensor has an unknown dtype")
        return cls(tensors, cuts)

    def pieces(self, name: str, start: int, end: int) -> Iterator[Piece]:
        """The pieces that hold elements ``[start, end)`` of a tensor, in order."""
        _, numel, cut = self.tensors[name]
        ranks, starts = self.cuts[cut]
        place = max(bisect_right(starts, start) - 1, 0)
        while start < end and place < len(starts) and starts[place] < end:
            last = starts[place + 1] if place + 1 < len(starts) else numel
            yield Piece(starts[place], last, ranks[place])
            place += 1


def _covers(cut: Cut, numel: int) -> bool:
    """Whether a cut's pieces are those of a tensor with ``numel`` elements."""
    edges = [*cut.starts, numel]
    whole = all(type(number) is int and number >= 0 for number in (*cut.ranks, *edges))
    rising = all(start < end for start, end in pairwise(edges))
    return whole and rising and edges[0] == 0 and len(cut.ranks) == len(cut.starts)


class _Builder:
    """The entries and cuts of an index that is being made.

    Attributes:
        places: {key of a cut: its place in ``cuts``}. Tensors that are cut alike have one key.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Entry] = {}
        self.cuts: list[Cut] = []
        self.places: dict[Hashable, int] = {}

    def add_cut(self, key: Hashable, name: str, numel: int, pieces: Iterable[Piece]) -> None:
        """Add the cut of the tensor ``name``.

        Args:
            pieces: those that are not empty, in any order.

        Raises:
            ValueError: they do not cover the tensor, or do so twice.
        """
        ordered, end = sorted(pieces), 0
        for piece in ordered:
            if piece.start != end:
                raise ValueError(f"the ranks' parts of {name} do not follow one another")
            end = piece.end
        if end != numel:
            raise ValueError(f"the ranks' parts of {name} have {end} of its {numel} elements")
        self.places[key] = len(self.cuts)
        self.cuts.append(Cut(tuple(p.rank for p in ordered), tuple(p.start for p in ordered)))

    def add(self, name: str, dtype: str, numel: int, key: Hashable) -> None:
        """Add a tensor, whose cut has been added.

        Raises:
            ValueError: there is one of that name.
        """
        if name in self.tensors:
            raise ValueError(f"{name} is saved twice")
        self.tensors[name] = Entry(dtype, numel, self.places[key])


def _pieces_of(ranges: NDArray[np.int64]) -> list[Piece]:
    """The pieces that are not empty, of all ranks' (start, size) of a tensor."""
    holding = ranges[:, 1].nonzero()[0]
    found = zip(ranges[holding].tolist(), holding.tolist(), strict=True)
    return [Piece(start, start + size, rank) for (start, size), rank in found]


def open_index(folder: Path) -> Index:
    """The index of a sound checkpoint.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return Index.read(folder)
    except ValueError as error:
        raise UserError(f"{folder} cannot be used: {error}") from error


def rank_file(folder: Path, rank: int) -> Path:
    """The file that a rank writes."""
    return folder / f"rank-{rank:05d}.safetensors"


def ranks_with_files(folder: Path) -> list[int]:
    """The ranks that have written a file into a checkpoint."""
    found = (FILE.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)
