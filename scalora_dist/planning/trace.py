"""Traces the activations of one micro-batch's forward and backward on tensors without storage."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from scalora_dist.modeling.loss import LossHead
from scalora_dist.modeling.offloaded_activations import AHEAD, HostCopies, OffloadedActivations
from scalora_dist.modeling.padding import needs_mask, whole_rows
from scalora_dist.profiling.flops import FORMULAS
from scalora_dist.profiling.kernels import Counts, KernelCount
from scalora_dist.profiling.live import LiveBytes


@dataclass
class Event:
    """The begin or end of a module's forward or backward.

    Attributes:
        module: the module's name.
        enters: whether the module begins; else it ends.
        backward: whether it happens during the backward, as gradient checkpointing's forwards do.
        recomputed: whether it is a forward of gradient checkpointing.
        live: bytes of activations at this event.
        most: largest number of bytes of activations from this event to the next.
    """

    module: str
    enters: bool
    backward: bool
    recomputed: bool
    live: int
    most: int = 0


@dataclass
class Trace:
    """The trace of one micro-batch.

    Attributes:
        events: all events in order. The first and last belong to the model itself ("").
        flops: floating-point operations of forward and backward, recomputation included.
        kernels: what a GPU does in forward and backward.
        offloaded: bytes that the host's memory takes for activations.
        sent: bytes of activations that the forward copies to the host.
        fetched: bytes of these that the backward copies back. The last ones never leave the device.
    """

    events: list[Event] = field(default_factory=list)
    flops: int = 0
    kernels: Counts = field(default_factory=Counts)
    offloaded: int = 0
    sent: int = 0
    fetched: int = 0


def trace_micro_batch(
    model: PreTrainedModel, examples: int, length: int, *, offloads: bool = False
) -> Trace:
    """Run forward and backward of a model without storage; with an attention mask if it needs one.

    The activations are those of scaled dot-product attention in its flash form: a GPU and torch's
    CPU kernel keep these. Gradients of parameters are not counted, because an engine stores them
    elsewhere.

    Args:
        model: the model on the meta device, in the dtypes that an engine computes in. It cannot be
            used afterwards.
        examples: number of sequences.
        length: tokens of each sequence.
        offloads: whether activations are kept in the host's memory.
    """
    trace = Trace()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(whole_rows())
        _without_storage(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        model.train()
        held = [*model.parameters(), *model.buffers()]
        tokens = torch.zeros(examples, length, dtype=torch.int64)
        inputs = {"input_ids": tokens}
        if needs_mask(model):
            inputs["attention_mask"] = torch.ones_like(tokens)
        products = stack.enter_context(_Products())
        kernels = stack.enter_context(KernelCount())
        live = stack.enter_context(LiveBytes(existing=[*held, *inputs.values()]))
        copies = _Uncopied(live)
        offloading = OffloadedActivations(copies)
        offloading.hold(held)

        def forward() -> Tensor:
            with offloading if offloads else nullcontext():
                return model(**inputs, **_no_cache(model)).logits

        head = model.get_output_embeddings()
        if type(head) is nn.Linear:
            head.__class__ = _EveryToken
        before = live.now
        with _hooks(model, trace.events, live, before):
            logits = forward()
            if changed := type(head) is _EveryToken and logits is not head.given:
                trace.events.clear()
            else:
                _loss(logits, tokens).backward()
        if changed:  # the model changes its logits after the head: use full logits, like TargetLoss
            head.__class__, head.given = nn.Linear, None
            del logits
            products.total = copies.sent = copies.pinned = 0
            kernels.take()
            with _hooks(model, trace.events, live, before):
                _loss(forward(), tokens).backward()
        trace.flops, trace.kernels = products.total, kernels.take()
        trace.offloaded, trace.sent, trace.fetched = copies.pinned, copies.sent, copies.fetched
    return trace


class _Uncopied(HostCopies):
    """Copies nothing to the host, and counts the bytes as ``StreamedCopies`` needs them.

    A fetched tensor that the host has freed is still live on the device, until the device is past
    its last use. The host may be ``AHEAD`` fetches ahead.

    Attributes:
        live: count of live bytes.
        sent: bytes copied to the host.
        fetched: bytes copied back.
        pinned: bytes on the host at the end of the forward. torch's pinned memory is allocated in
            powers of two.
        freed: bytes of fetched tensors that the host has freed, after each of the last fetches.
    """

    def __init__(self, live: LiveBytes) -> None:
        self.live = live
        self.sent = self.fetched = self.pinned = 0
        self.freed: deque[int] = deque()

    def send(self, tensor: Tensor) -> tuple[Any, ...]:
        self.sent += tensor.nbytes
        self.pinned += 1 << (tensor.nbytes - 1).bit_length()
        return tensor.shape, tensor.stride(), tensor.dtype

    def fetch(self, copy: tuple[Any, ...]) -> Tensor:
        # Here the host waits until the device has begun the fetch ``AHEAD`` fetches ago.
        if len(self.freed) > AHEAD:
            self.live.now -= self.freed.popleft()
        self.freed.append(0)
        tensor = torch.empty_strided(*copy[:2], dtype=copy[2])
        self.fetched += tensor.nbytes
        weakref.finalize(tensor.untyped_storage(), self._free, tensor.nbytes)
        return tensor

    def _free(self, nbytes: int) -> None:
        self.freed[-1] += nbytes
        self.live.now += nbytes


class _Products(TorchDispatchMode):
    """Counts the floating-point operations of products inside ``with``, by torch's formulas.

    torch's own FlopCounterMode is not used: it keeps the tensors that it has seen alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = _SAME_FLOPS.get(func._overloadpacket, func._overloadpacket)
        if packet in FORMULAS:
            self.total += FORMULAS[packet](*args, **(kwargs or {}), out_val=out)
        return out


_aten = torch.ops.aten
_SAME_FLOPS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _aten._scaled_dot_product_flash_attention_backward
    ),
}


class _EveryToken(LossHead):
    """The LM head in training, with every token a target: a plan does not know the real targets."""

    given: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        hidden = input[:, :-1].flatten(0, 1)
        wanted = torch.zeros(len(hidden), dtype=torch.int64)
        self.given = self._in_chunks(hidden, wanted).loss.view(1, 1, 1)
        return self.given


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """The loss from a model's output: the loss itself, logits per token, or logits per example."""
    if logits.numel() == 1:
        return logits.sum()
    if logits.dim() == 3:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    return F.cross_entropy(logits.float(), tokens[:, 0])


def _no_cache(model: PreTrainedModel) -> dict[str, bool]:
    return {"use_cache": False} if model.can_generate() else {}


def _without_storage(model: nn.Module) -> None:
    """Replace all parameters and buffers by fake tensors. Tied ones stay tied.

    Called inside a FakeTensorMode.
    """
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    made[tensor] = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        made[tensor] = nn.Parameter(made[tensor], tensor.requires_grad)
                store[name] = made[tensor]


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _hooks(model: nn.Module, events: list[Event], live: LiveBytes, before: int) -> Iterator[None]:
    """Record when modules begin and end, in forward and backward.

    Args:
        events: list to which the events are added.
        live: count of live bytes.
        before: bytes to subtract from ``live``: parameters, buffers and inputs.
    """

    def note(name: str, *, enters: bool, backward: bool, recomputed: bool = False) -> None:
        if events:
            events[-1].most = live.most - before
        live.most = live.now
        now = live.now - before
        event, place = Event(name, enters, backward, recomputed, now, now), len(events)
        # One gradient may belong to an outer and an inner module: the outer one begins first.
        while backward and not recomputed and place and _nested(events[place - 1], event):
            place -= 1
        events.insert(place, event)

    def at_gradient(name: str, *, enters: bool) -> Callable[[Tensor], None]:
        return lambda _: note(name, enters=enters, backward=True)

    def watch(name: str, module: nn.Module) -> None:
        def begin(_: nn.Module, args: Any) -> None:
            again = torch._C._current_graph_task_id() != -1
            note(name, enters=True, backward=again, recomputed=again)
            for tensor in _with_gradient(args)[:1] if not again else ():
                tensor.register_hook(at_gradient(name, enters=False))

        def end(_: nn.Module, __: Any, out: Any) -> None:
            again = torch._C._current_graph_task_id() != -1
            note(name, enters=False, backward=again, recomputed=again)
            for tensor in _with_gradient(out)[:1] if not again else ():
                tensor.register_hook(at_gradient(name, enters=True))

        handles.append(module.register_forward_pre_hook(begin))
        handles.append(module.register_forward_hook(end))

    handles: list[Any] = []
    for name, module in model.named_modules():
        watch(name, module)
    try:
        yield
        note("", enters=False, backward=True)
        events[-1].most = live.now - before
    finally:
        for handle in handles:
            handle.remove()


def _with_gradient(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.requires_grad]


def _nested(earlier: Event, event: Event) -> bool:
    """Whether ``event``, which was recorded after ``earlier``, belongs before it."""
    if not earlier.backward or earlier.recomputed or earlier.enters != event.enters:
        return False
    outer, inner = (event, earlier) if event.enters else (earlier, event)
    return outer.module == "" or inner.module.startswith(f"{outer.module}.")
