"""Bytes of tensors that live, op by op: in a real step, or in one on the meta device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that ops inside it make, or work in, while they live.

    What an op allocates and frees inside itself is not seen, nor what C++ holds without Python's
    knowledge before an op has touched it.

    Attributes:
        now: bytes that live; ``most``: the largest ``now`` so far. Set ``most`` to ``now`` to
            begin anew.
    """

    def __init__(self, *, existing: Iterable[Tensor] = ()) -> None:
        """
        Args:
            existing: tensors that count from the beginning.
        """
        super().__init__()
        self.now = self.most = 0
        self.sizes: dict[weakref.ref[torch.UntypedStorage], int] = {}
        for tensor in existing:
            self._note(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out

    def __enter__(self) -> LiveBytes:
        self._resize = resize = torch.UntypedStorage.resize_

        def noted(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)  # how FSDP frees what it has gathered
            self._note_storage(storage)

        torch.UntypedStorage.resize_ = noted  # type: ignore[assignment,method-assign]
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[assignment,method-assign]
        super().__exit__(*args)

    def _note(self, tensor: Tensor) -> None:
        inner = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
        if inner.layout is torch.strided:
            self._note_storage(inner.untyped_storage())

    def _note_storage(self, storage: torch.UntypedStorage) -> None:
        key, size = weakref.ref(storage, self._forget), storage.nbytes()
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.most = max(self.most, self.now)

    def _forget(self, key: weakref.ref[torch.UntypedStorage]) -> None:
        self.now -= self.sizes.pop(key, 0)


def living_tensors() -> list[Tensor]:
    """Every tensor that Python knows of."""
    return [x for x in gc.get_objects() if isinstance(x, Tensor)]
