"""Keeps what a forward saves for its backward in the host's memory, but never a parameter."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

SMALLEST = 2**18  # bytes; smaller tensors stay, because a copy of its own takes longer than they do
# Tensors whose copies to the host may be under way. The last ones of a forward stay on the device,
# because the backward begins with them.
IN_FLIGHT = 4
AHEAD = 8  # fetched tensors that the host may be ahead of the device, as they take up its memory

cuda = torch.cuda  # streams


class HostCopies:
    """Copies tensors to the host's memory and back, on the same device: a plain copy.

    The base of the two other kinds: with CUDA's streams, and without storage in a plan.
    """

    def send(self, tensor: Tensor) -> Any:
        """Begin to copy ``tensor`` to the host. Returns the copy, for ``fetch``."""
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)

    def fetch(self, copy: Any) -> Tensor:
        """The tensor on the device again."""
        fetched = torch.empty_strided(copy.shape, copy.stride(), dtype=copy.dtype)
        return fetched.copy_(copy)

    def landed(self, copy: Any) -> None:
        """Called before the memory of a tensor that was sent is freed."""


class StreamedCopies(HostCopies):
    """Copies to and from pinned memory on a CUDA stream of their own, beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = cuda.Stream(device)
        self.fetched: deque[torch.cuda.Event] = deque()

    def send(self, tensor: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        host = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=True
        )
        self.stream.wait_stream(cuda.current_stream(self.device))
        with cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
        return host, self.stream.record_event()

    def fetch(self, copy: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        host, compute = copy[0], cuda.current_stream(self.device)
        # Memory of this stream that the computation has used is free again only when the device is
        # past that use. So the host waits if it is far ahead, like FSDP's limit of all-gathers.
        self.fetched.append(compute.record_event())
        if len(self.fetched) > AHEAD:
            self.fetched.popleft().synchronize()
        with cuda.stream(self.stream):
            tensor = torch.empty_strided(
                host.shape, host.stride(), dtype=host.dtype, device=self.device
            )
            tensor.copy_(host, non_blocking=True)
        compute.wait_stream(self.stream)
        tensor.record_stream(compute)
        return tensor

    def landed(self, copy: tuple[Tensor, torch.cuda.Event]) -> None:
        cuda.current_stream(self.device).wait_event(copy[1])


class _Stays:
    """A tensor that a node saved, and that stays where it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # a node's own output would keep that node
        self.version = tensor._version

    def fetch(self) -> Tensor:
        return _unchanged(self.tensor, self.version)


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    """``tensor``, if nothing has changed it in place. Torch checks this only without hooks."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a tensor of shape {tuple(tensor.shape)} is at version {tensor._version}; "
            f"expected version {version} instead"
        )
    return tensor


class _Sent:
    """A tensor that was sent to the host, for each node of the graph that saved it.

    Attributes:
        here: the tensor on the device, while it is there.
        version: torch's count of changes in place, when it was saved.
        copy: its copy on the host.
        uses: number of nodes that have not asked for it yet.
    """

    def __init__(self, tensor: Tensor, copies: HostCopies) -> None:
        self.here: Tensor | None = tensor
        self.version = tensor._version
        self.copies = copies
        self.copy = copies.send(tensor)
        self.uses = 0

    def leave(self) -> None:
        """Free it on the device, unless it was changed while its copy was under way."""
        assert self.here is not None
        if self.here._version == self.version:
            self.here = None

    def fetch(self) -> Tensor:
        if self.here is None:
            self.here = self.copies.fetch(self.copy)
            self.version = self.here._version
        tensor = _unchanged(self.here, self.version)
        self.uses -= 1
        self.here = tensor if self.uses > 0 else None
        return tensor


class _OfParameter:
    """A parameter that a node saved, or a view of all of it in its dtype.

    A hook is given an alias of a saved parameter. If it were kept, so would be a parameter that an
    engine has gathered and frees after its layer's forward. The engine gathers it again for the
    layer's backward.
    """

    def __init__(self, parameter: Tensor, saved: Tensor) -> None:
        self.parameter, self.version = parameter, parameter._version
        self.shape, self.stride = saved.shape, saved.stride()

    def fetch(self) -> Tensor:
        p = _unchanged(self.parameter, self.version).detach()
        return p.as_strided(self.shape, self.stride, p.storage_offset())


class OffloadedActivations(saved_tensors_hooks):
    """Inside ``with``, what autograd saves goes to the host, until a backward asks for it.

    What stays: parameters and buffers, tensors of less than ``SMALLEST`` bytes, those whose
    elements overlap, and the last ``IN_FLIGHT`` of a forward. A tensor that several nodes save
    goes once. As in torch, a backward fails if what stays was changed in place since. Inside a
    checkpointed block, checkpointing's own hooks replace these: only the block's input goes to the
    host.

    Attributes:
        copies: copies to the host and back.
        held: {storage: {offset in it: parameter or buffer}}, as the modules' forwards found them.
        sent: {storage: {where in it: what was sent}} of the tensors that are still on the device.
        in_flight: what was sent last.
    """

    def __init__(self, copies: HostCopies) -> None:
        super().__init__(self._pack, self._unpack)
        self.copies = copies
        self.held: WeakKeyDictionary[torch.UntypedStorage, dict[int, Tensor]] = WeakKeyDictionary()
        self.sent: WeakKeyDictionary[torch.UntypedStorage, dict[Any, _Sent]] = WeakKeyDictionary()
        self.in_flight: deque[_Sent] = deque()

    def hold(self, tensors: Iterable[Tensor | None]) -> None:
        """Note parameters and buffers as they are now, for example gathered."""
        for tensor in tensors:
            if tensor is not None and not isinstance(tensor, DTensor):
                places = self.held.setdefault(tensor.untyped_storage(), {})
                places[int(tensor.storage_offset())] = tensor

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for sent in self.in_flight:
            self.copies.landed(sent.copy)
        self.in_flight.clear()
        self.sent.clear()

    def _pack(self, tensor: Tensor) -> Any:
        if isinstance(tensor, DTensor) or tensor.layout is not torch.strided:
            return _Stays(tensor)
        storage, offset = tensor.untyped_storage(), int(tensor.storage_offset())
        if (places := self.held.get(storage)) is not None:
            parameter = places.get(offset)
            if parameter is None or parameter.dtype != tensor.dtype or _has_bits(tensor):
                return _Stays(tensor)
            return _OfParameter(parameter, tensor)
        reach = _reach(tensor)
        if tensor.nbytes < SMALLEST or reach is None:
            return _Stays(tensor)
        places_sent = self.sent.setdefault(storage, {})
        where = (offset, tensor.shape, tensor.stride(), tensor.dtype)
        key = (*where, tensor._version, tensor.is_conj(), tensor.is_neg())
        if (sent := places_sent.get(key)) is None:
            # What lies between the elements does not go along.
            dense = tensor if reach == tensor.numel() else tensor.contiguous()
            sent = places_sent[key] = _Sent(dense.detach(), self.copies)
            self.in_flight.append(sent)
            if len(self.in_flight) > IN_FLIGHT:
                landed = self.in_flight.popleft()
                self.copies.landed(landed.copy)
                landed.leave()
        sent.uses += 1
        return sent

    @staticmethod
    def _unpack(packed: Any) -> Tensor:
        return packed.fetch()


def _has_bits(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a view whose elements are conjugated or negated when they are read."""
    return tensor.is_conj() or tensor.is_neg()


def _reach(tensor: Tensor) -> int | None:
    """Number of elements from the first to the last in memory; None: some may be in one place."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return None
            reach += stride * (size - 1)
    return reach


def offload_activations(
    model: nn.Module,
    whole: Iterable[nn.Module],
    device: torch.device,
    *,
    inside: bool,
) -> OffloadedActivations:
    """Let ``model`` keep its activations on the host. Called after an engine has sharded it.

    Args:
        whole: modules whose forward finds all parameters in place that are inside them, too: the
            decoder blocks, and layers that PEFT wraps.
        device: where the model computes.
        inside: whether forwards inside a block are watched too, as ZeRO-3 gathers there. Compiled
            blocks must not be.
    """
    copies = StreamedCopies(device) if device.type == "cuda" else HostCopies()
    context, forward, hidden = OffloadedActivations(copies), model.forward, set[nn.Module]()
    whole = list(whole)
    if not inside:
        hidden = {module for block in whole for module in block.modules()} - {*whole}
    for module in model.modules():
        if module not in hidden:
            module.register_forward_pre_hook(_holder(context, recurse=module in whole))

    @functools.wraps(forward)
    def offloading(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with context:
            return forward(*args, **kwargs)

    model.forward = offloading
    return context


def _holder(context: OffloadedActivations, *, recurse: bool) -> Callable[[nn.Module, Any], None]:
    def hold(module: nn.Module, _: Any) -> None:
        context.hold([*module.parameters(recurse), *module.buffers(recurse)])

    return hold
