"""Counts the bytes of live tensors, op by op, in a real step or in one on the meta device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that ops inside ``with`` create or write, while they live.

    It does not count what an op allocates and frees internally. It does not count what C++ holds
    without Python's knowledge before an op has returned it.

    Attributes:
        now: live bytes.
        most: largest ``now`` so far, bytes. Set it to ``now`` to restart the maximum.
        sizes: {storage: bytes} of the live storages.
    """

    def __init__(self, *, existing: Iterable[Tensor] = ()) -> None:
        """
        Args:
            existing: tensors that are counted from the beginning.
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
            resize(storage, size)  # FSDP frees gathered parameters this way
            self._note_storage(storage)

        # mypy allows no assignment to a method, and torch's own returns Any.
        torch.UntypedStorage.resize_ = noted  # type: ignore[assignment,method-assign]
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
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
    """All tensors with memory that Python's garbage collector knows.

    A compiler leaves fake ones behind, and what is read again from files has meta ones.
    """
    found = [x for x in gc.get_objects() if isinstance(x, Tensor)]
    return [x for x in found if not isinstance(x, FakeTensor) and not x.is_meta]
