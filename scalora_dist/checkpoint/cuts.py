"""Which range of each tensor a rank saves, as a short text that it sends to rank 0 once."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scalora_dist.checkpoint.index import Facts, Index
from scalora_dist.checkpoint.parts import FlatPart
from scalora_dist.model_io.safetensors_writer import DTYPE_NAMES


@dataclass(frozen=True)
class Cuts:
    """What one rank saves of the tensors that all ranks know, and of those that are its alone.

    Attributes:
        shared: checksum of the names, dtypes and sizes of the tensors that all ranks know.
        ranges: (tensors, 2) int64, in the order of their names: the first element that this rank
            saves, and the number of elements.
        own: the tensors that this rank alone knows. It saves all of them.
    """

    shared: str
    ranges: NDArray[np.int64]
    own: Facts

    @classmethod
    def of(cls, shared: Mapping[str, FlatPart], own: Mapping[str, FlatPart]) -> Cuts:
        names = sorted(shared)
        found = [(shared[name].offset, shared[name].local.numel()) for name in names]
        ranges = np.array(found, dtype=np.int64).reshape(-1, 2)
        return cls(checksum(facts(shared)), ranges, facts(own))

    def encode(self) -> str:
        """A text for ``decode``. It has a few kB for thousands of tensors, which are cut alike."""
        packed = base64.b64encode(zlib.compress(self.ranges.tobytes())).decode()
        return json.dumps([self.shared, packed, self.own])

    @classmethod
    def decode(cls, text: str) -> Cuts:
        shared, packed, own = json.loads(text)
        ranges = np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype=np.int64)
        facts = {name: (dtype, numel) for name, (dtype, numel) in own.items()}
        return cls(shared, ranges.reshape(-1, 2), facts)


def index_of(shared: Facts, ranks: Sequence[Cuts]) -> Index:
    """The index of what ``ranks`` save, in rank order.

    Args:
        shared: the tensors that all ranks know, in the order of their names.

    Raises:
        ValueError: the ranks know other tensors, or a tensor is not saved once, in full.
    """
    known = checksum(shared)
    for rank, cuts in enumerate(ranks):
        if cuts.shared != known:
            raise ValueError(f"rank {rank} saves other tensors than rank 0")
    return Index.of(shared, [cuts.ranges for cuts in ranks], [cuts.own for cuts in ranks])


def facts(parts: Mapping[str, FlatPart]) -> Facts:
    """{tensor: (dtype, elements of the full tensor)}, in the order of their names."""
    return {x: (DTYPE_NAMES[parts[x].local.dtype], parts[x].numel) for x in sorted(parts)}


def checksum(shared: Facts) -> str:
    """The checksum that ranks compare, for they must know the same tensors."""
    return hashlib.sha256(json.dumps(shared).encode()).hexdigest()
