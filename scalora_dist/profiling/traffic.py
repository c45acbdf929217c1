"""Counts the bytes that go through collectives."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Counts all collectives of torch.distributed inside ``with``, DeepSpeed's own included.

    The bytes are those of tensors, not of the network: what a ring or a tree moves for a collective
    depends on the backend. Barriers carry no data and are not counted.

    Attributes:
        sent: bytes of the tensors that this rank passes to collectives.
        received: bytes of the tensors that collectives fill on this rank, its own part included.
        gathered: bytes of ``received`` that come from all-gathers.
        messages: bytes of each collective's larger side, sent or received, summed.
        collectives: number of calls of each collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = self.received = self.gathered = self.messages = 0
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
            self.messages += max(sizes)
            self.collectives[name.partition(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))
