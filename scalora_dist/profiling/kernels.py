"""Counts what a GPU would do: kernels launched, bytes read and written, times that the host waits.

It needs no GPU. It counts torch's operators as they are called, on tensors of any device, also on
fake ones, which have no storage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from scalora_dist.profiling.launches import aten, launches, masks_of
from scalora_dist.profiling.traffic import Traffic


@dataclass
class Counts:
    """What the device did in one phase, as ``KernelCount`` has the same attributes."""

    kernels: Counter[str] = field(default_factory=Counter)
    read: int = 0
    written: int = 0
    synchronisations: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    collective_bytes: int = 0

    @property
    def total(self) -> int:
        """Kernels launched, collectives not among them."""
        return sum(self.kernels.values())

    @property
    def waits(self) -> int:
        """Times that the host waited for the device."""
        return sum(self.synchronisations.values())

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.kernels + other.kernels,
            self.read + other.read,
            self.written + other.written,
            self.synchronisations + other.synchronisations,
            self.collectives + other.collectives,
            self.collective_bytes + other.collective_bytes,
        )

    def __sub__(self, other: Counts) -> Counts:
        """What is in these counts and not in ``other``, of work that ``other`` is a part of."""
        return Counts(
            self.kernels - other.kernels,
            self.read - other.read,
            self.written - other.written,
            self.synchronisations - other.synchronisations,
            self.collectives - other.collectives,
            self.collective_bytes - other.collective_bytes,
        )


class KernelCount(Traffic):
    """Counts launches, bytes and host synchronisations inside ``with``, and all collectives.

    A dispatch mode sees an operator after torch has split it up, where torch does so before it
    picks a device: ``F.linear``, ``matmul``, ``isfinite``, ``rms_norm`` and all others of the kind
    CompositeImplicit. It does not see what ATen calls inside an operator; ``launches.SEVERAL``
    names those that are several launches. The rules:

    * A view and an allocation are no launch. A copy between two devices is one.
    * Another operator of torch is one launch, and so is a custom operator (a Triton kernel). The
      exceptions are in ``scalora_dist.profiling.launches``, ``cat`` and ``_foreach`` among them.
    * An operator reads its inputs once and writes its outputs once. One that changes a tensor in
      place does both, unless it overwrites all of it. A broadcast tensor is read at its own size.
      An operator that picks rows reads as many bytes as it writes.
    * The host waits for: a number of a tensor (``item``, ``bool``), a result whose shape depends
      on values (``nonzero``, a mask as an index), a copy from the device to the host's pageable
      memory or with ``non_blocking`` False, and a copy to the device from pageable memory. Such a
      copy is made of an index that is on the CPU.

    With tensors on the CPU, ``tolist``, ``cpu`` and ``to`` are not seen: they copy nothing there.

    Attributes:
        kernels: launches of each operator. Collectives are not among them.
        read: bytes read by them.
        written: bytes written by them.
        synchronisations: times that the host waits, by the operator that it waits for.
        collectives: number of calls of each collective.
    """

    open: ClassVar[list[KernelCount]] = []  # those whose ``with`` is running

    def __init__(self, device: str | None = None) -> None:
        """
        Args:
            device: type of the device whose kernels are counted, such as "cuda". Operators on
                tensors of other devices alone are not counted. None: every operator is counted as
                if its tensors were a GPU's.
        """
        super().__init__()
        self.device = device
        self.kernels: Counter[str] = Counter()
        self.synchronisations: Counter[str] = Counter()
        self.read = self.written = 0

    @property
    def total(self) -> int:
        """Kernels launched so far, collectives not among them."""
        return sum(self.kernels.values())

    @property
    def collective_bytes(self) -> int:
        """Bytes of all collectives: of each, the larger of what it sends and receives."""
        return self.messages

    def take(self) -> Counts:
        """The counts since the last call, or since the beginning. All counts start again at 0."""
        counts = Counts(
            self.kernels,
            self.read,
            self.written,
            self.synchronisations,
            self.collectives,
            self.collective_bytes,
        )
        self.kernels, self.synchronisations, self.collectives = Counter(), Counter(), Counter()
        self.read = self.written = 0
        self.sent = self.received = self.gathered = self.messages = 0
        return counts

    def __enter__(self) -> KernelCount:
        self.open.append(self)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self.open.remove(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls the operators on its parts, which come here again
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self.note_collective(func._opname, args)
        if func.namespace in _NO_KERNELS or func.is_view:
            return func(*args, **kwargs)
        name = f"{func.namespace}.{func._opname}"
        if waits := self._waits(name, args, kwargs):
            self.synchronisations[name] += waits  # before the call: on fake tensors it may raise
        out = func(*args, **kwargs)
        if not any(self._is_here(x) for x in _tensors((args, kwargs, out))):
            return out
        if name == "aten._to_copy" and _same_storage(out, args[0]):
            return out  # a fake GPU's: there was nothing to copy
        if name in ("aten._to_copy", "aten.copy_") and _copy_waits(name, args, kwargs, out):
            self.synchronisations[name] += 1
        if count := launches(name, args, kwargs, out):
            self.kernels[name] += count
            self._note_bytes(func, name, args, kwargs, out)
        return out

    def _is_here(self, tensor: Tensor) -> bool:
        return self.device in (None, tensor.device.type)

    def _note_bytes(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        changed: list[Tensor] = []  # in place, or given as `out=`
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                changed.extend(_tensors(given))
        ids = {id(tensor) for tensor in changed}
        made = [tensor for tensor in _tensors(out) if id(tensor) not in ids]
        inputs = [x for x in _tensors((args, kwargs)) if id(x) not in ids]
        if name in _PUTS_ROWS:  # changes as much of the tensor as the values have
            values = inputs[-1:] if inputs else []
            self.written += sum(map(_bytes, values))
        else:
            self.written += sum(map(_bytes, changed + made))
        if name in _PICKS_ROWS:
            self.read += sum(map(_bytes, made + inputs[1:]))
        else:
            self.read += sum(map(_bytes, inputs))
            if name not in _OVERWRITES and name not in _PUTS_ROWS:
                self.read += sum(map(_bytes, changed))

    def _waits(self, name: str, args: Any, kwargs: Any) -> int:
        """Times that the host waits in an operator other than a copy."""
        first = next(_tensors((args, kwargs)), None)
        if first is None or not self._is_here(first):
            return 0
        if name == "aten.repeat_interleave":
            return int(kwargs.get("output_size") is None)
        if name in ("aten.index", "aten.index_put", "aten.index_put_"):
            masks = [x for x in masks_of(args[1]) if self._is_here(x)]
            shape_unknown = bool(masks) and (name == "aten.index" or args[2].numel() > 1)
            return int(shape_unknown) + _sent(args)
        return int(name in _WAITS)


def _sent(args: Any) -> int:
    """Number of indices on the CPU of a tensor on a device: ATen copies each, and waits."""
    indexed, indices = args[0], args[1]
    return sum(index.device != indexed.device for index in _tensors(indices))


def note_wait(what: str) -> None:
    """Count a wait that is no operator, such as a stream's, in all counts that are open."""
    for count in KernelCount.open:
        count.synchronisations[what] += 1


def _copy_waits(name: str, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Whether the host waits for a copy, which it does only between two devices."""
    if name == "aten.copy_":
        source = args[1]
        no_wait = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        pinned = out.is_pinned() if out.device.type == "cpu" else True
    else:
        source = args[0]
        no_wait = kwargs.get("non_blocking", False)
        pinned = True  # torch allocates pinned memory for a result on the host
    if source.device.type == out.device.type:
        return False
    if source.device.type == "cpu":
        return not (no_wait and source.is_pinned())
    return not (no_wait and pinned)


# Namespaces of operators that launch nothing; collectives are counted apart.
_NO_KERNELS = frozenset({"c10d", "_c10d_functional", "prim", "profiler"})

# The host waits for these.
_WAITS = aten(
    "_linalg_check_errors _linalg_eigh _linalg_svd _local_scalar_dense _unique2 equal is_nonzero "
    "masked_select nonzero unique_consecutive unique_dim"
)
# These don't read the tensor that they change.
_OVERWRITES = aten("_foreach_copy_ _foreach_zero_ copy_ fill_ normal_ random_ uniform_ zero_")
# These read as much of their first tensor as they write.
_PICKS_ROWS = aten("embedding gather index index_select take")
# These write as much of the tensor that they change as they are given values.
_PUTS_ROWS = aten("index_copy_ index_put_ scatter_")


def _tensors(values: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(values) if isinstance(x, Tensor))


def _same_storage(tensor: Tensor, other: Tensor) -> bool:
    return tensor.untyped_storage()._cdata == other.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor, each element of a broadcast one counted once."""
    if tensor.layout is not torch.strided:
        return 0
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride or size == 0 else 1
    return numel * tensor.element_size()
