"""Bytes that go through collectives."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Counts what goes through torch.distributed inside it, whoever calls: DeepSpeed's own too.

    ``sent`` and ``received`` are the bytes of the tensors that this rank hands to collectives and
    of those that they fill here, its own part included; what a ring or a tree then moves for one
    is the backend's affair. Barriers carry nothing and are left out. ``gathered`` are the bytes
    of ``received`` that all-gathers brought.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = self.received = self.gathered = 0
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(func).partition(".")
        if namespace == "c10d" and not name.startswith("barrier"):
            tensors = [[x for x in tree_leaves(arg) if isinstance(x, Tensor)] for arg in args]
            # c10d's operators take (outputs, inputs, …), or first one list that is both.
            sizes = [sum(x.nbytes for x in leaves) for leaves in tensors if leaves]
            self.received += sizes[0]
            self.sent += sizes[-1]
            self.gathered += sizes[0] if "allgather" in name else 0
            self.collectives[name.partition(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))
