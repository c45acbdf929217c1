"""Finds where the host reads a value of a tensor: on a GPU it would wait for the device there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Their results, or the shapes of these, are read by the host.
READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}


class HostReads(TorchDispatchMode):
    """Inside ``with``, lists the operations for which the host would wait.

    Attributes:
        found: their names, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indexed = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
        if func in READS or (indexed and any(map(_is_mask, tree_leaves(args[1])))):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool
