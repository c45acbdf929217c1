"""Computes gradients of the loss with respect to frozen, sharded weights, sharded by rows."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from scalora_dist.core import host
from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.host_sums import HostSums
from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError
from scalora_dist.methods.init.groups import Budget, group_layers, sum_bytes
from scalora_dist.modeling.padding import whole_rows


def weight_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    losses: Callable[[], Iterable[Tensor]],
    world: World,
    *,
    release: Callable[[], object],
    budget: Budget,
    loss_scale: float = 1.0,
) -> Iterator[tuple[str, FlatShard]]:
    """Yield this rank's rows of ∇W, summed over micro-batches and ranks, one layer after another.

    A collective: one reduce-scatter per layer and micro-batch, and one all-reduce per micro-batch.

    The layers are processed in groups (``group_layers``), with one pass over the samples for each.
    The sums of a group fit ``budget`` on this rank. Besides the sums, a rank holds the full
    gradient of one layer and one micro-batch. No parameter gets a gradient, so an engine's hooks on
    parameters do not run. Its hooks on modules gather and free the weights.

    The model runs in evaluation mode, without dropout. Only modules with activation checkpointing
    stay in training mode, since transformers checkpoints only there. At each yield the model is
    back in its old modes.

    Args:
        model: the model that contains ``layers``. Only its modes are changed.
        layers: {name: layer} in model order. A layer has ``out_features`` m and ``in_features`` n.
            Its input is (…, n) and its output (…, m), as for W. The output may include a term that
            is linear in A, where A = 0.
        losses: one pass over this rank's samples. Yields scalars whose sum over micro-batches and
            ranks is the loss, each after ONE forward. They must come from ``model`` itself, because
            DeepSpeed's engine would prepare a step of its own. Every rank must yield equally many
            (times 0 where samples run out). They must not be kept: each holds its activations.
        world: the ranks.
        release: called after each backward: ``Engine.release``.
        budget: memory of this rank for the sums of one group, the same on every rank. The sums do
            not depend on it.
        loss_scale: losses are multiplied by it and sums divided by it, for a backward in float16.
            Non-finite sums mean that it was too large.

    Yields:
        (name, rows): float32 on the device, ceil(m / world) full rows per rank, split as by
        torch.chunk. They are sharded over the group of all ranks, however the engine shards W.

    Raises:
        UserError: on every rank, where the ranks' samples go through different layers.
    """
    groups = group_layers(sizes_of(layers, world), budget)
    sums = HostSums(world.device)
    with tqdm(
        desc="gradients of the weights",
        unit="batch",
        disable=None if world.is_main else True,
        leave=False,
    ) as progress:
        for number, places in enumerate(groups, 1):
            progress.set_postfix_str(f"pass {number} of {len(groups)}")
            group = {
                name: _Rows(layers[name], world, sums if place == "host" else None)
                for name, place in places.items()
            }
            for _ in _backwards(model, group, losses, world, release, loss_scale):
                progress.update()
            progress.total = progress.n // number * len(groups)
            for name in places:
                yield name, group.pop(name).shard(loss_scale)


def rehearse(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    losses: Callable[[], Iterable[Tensor]],
    world: World,
    *,
    release: Callable[[], object],
    loss_scale: float = 1.0,
) -> None:
    """Do what ``weight_gradients`` does in a pass over all layers, but keep no sums. A collective.

    What it takes of a rank's memory is what a pass takes beside its sums.

    Args:
        model, layers, losses, world, release, loss_scale: as for ``weight_gradients``.
    """
    group = {name: _Unkept(layer, world) for name, layer in layers.items()}
    for _ in _backwards(model, group, losses, world, release, loss_scale):
        pass


def sizes_of(layers: Mapping[str, nn.Module], world: World) -> dict[str, int]:
    """{layer: bytes on a rank of the sum of its ∇W}."""
    return {name: sum_bytes(_shape(layer), world.size) for name, layer in layers.items()}


def _backwards(
    model: nn.Module,
    group: Mapping[str, _Rows],
    losses: Callable[[], Iterable[Tensor]],
    world: World,
    release: Callable[[], object],
    loss_scale: float,
) -> Iterator[None]:
    """One pass: add the part of each micro-batch to the rows of the group."""
    with _without_dropout(model), _without_reductions(model), _Taps(group, world) as taps:
        for loss in losses():
            taps.backward(loss * loss_scale)
            del loss  # it holds the activations of the layers before the group
            release()
            yield


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(m, n) of a layer's W.

    It is not read from the weight: under ZeRO-3 the weight's own shape is empty. Layers that PEFT
    wraps have these attributes too, without a type in common.
    """
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


class _Rows:
    """The rows of one layer's ∇W (m, n) that this rank sums."""

    def __init__(self, layer: nn.Module, world: World, sums: HostSums | None = None) -> None:
        """
        Args:
            sums: adds to a sum in the host's memory; None: the sum is on the device.
        """
        self.layer = layer
        self.world = world
        self.sums = sums
        self.shape = _shape(layer)
        self.share = ceil_div(self.shape[0], world.size)
        self.sum: Tensor | None = None  # (share, n) float32, padded on the last ranks

    def add(self, x: Tensor, grad_y: Tensor) -> None:
        """Add the sum of ``grad_yᵀ x`` over all ranks: one reduce-scatter.

        Args:
            x: this rank's input, (…, n), any float dtype.
            grad_y: this rank's gradient of the output, (…, m), any float dtype.
        """
        m, n = self.shape
        whole = torch.zeros(self.world.size * self.share, n, device=x.device)
        rows, x = grad_y.flatten(0, -2).float(), x.flatten(0, -2).float()
        torch.mm(rows.T, x, out=whole[:m])
        part = whole.new_empty(self.share, n)
        dist.reduce_scatter_tensor(part, whole)
        whole.untyped_storage().resize_(0)  # gloo's threads keep their last messages for long
        self._keep(part)

    def _keep(self, part: Tensor) -> None:
        """Add a micro-batch's part (share, n)."""
        if self.sums is None:
            self.sum = part if self.sum is None else self.sum.add_(part)
            return
        if self.sum is None:
            self.sum = torch.zeros(self.share, part.shape[1])
        self.sums.add_(self.sum, part)

    def shard(self, loss_scale: float) -> FlatShard:
        m, n = self.shape
        start = min(self.world.rank * self.share, m)
        end = min(start + self.share, m)
        if self.sum is None:  # no sample reached this layer
            self.sum = torch.zeros(self.share, n, device=self.world.device)
        if self.sums is not None:
            self.sums.wait()
        total = host.to_device(self.sum, self.world.device)
        rows = total.div_(loss_scale)[: end - start]
        return FlatShard(rows.view(-1), start * n, self.shape, dist.group.WORLD)


class _Unkept(_Rows):
    """Rows of a rehearsal, which need no memory."""

    def _keep(self, part: Tensor) -> None: ...


class _Taps:
    """Forward hooks that put a ``_Tap`` on the output of each layer of a group.

    Attributes:
        group: {name: rows to sum} of the layers.
        world: the ranks.
        end: scalar that all taps depend on.
        reached: names of the layers that were reached by forwards since the last backward.
    """

    def __init__(self, group: Mapping[str, _Rows], world: World) -> None:
        self.group = group
        self.world = world
        # Backward runs from the loss to this scalar, through all taps, and reaches no parameter.
        self.end = torch.zeros((), device=world.device, requires_grad=True)
        self.reached: list[str] = []

    def __enter__(self) -> _Taps:
        self.hooks = ExitStack()
        for name, rows in self.group.items():
            self.hooks.enter_context(rows.layer.register_forward_hook(self._hook(name, rows)))
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.close()

    def _hook(self, name: str, rows: _Rows) -> Callable[..., Tensor | None]:
        def tap(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            self.reached.append(name)
            return _Tap.apply(inputs[0].detach(), output, self.end, rows.add)

        return tap

    def backward(self, loss: Tensor) -> None:
        """Let every tap add its part of ∇W of ``loss``. Only one forward per backward."""
        # Each tap is a collective: if the ranks reached different layers, they would hang.
        if not self.world.agree(zlib.crc32(" ".join(self.reached).encode())):
            raise UserError(
                "the ranks' samples go through different layers (experts?): "
                "leave those out of --target_modules"
            )
        with whole_rows():
            torch.autograd.grad(loss, self.end, allow_unused=True)
        self.reached.clear()


class _Tap(torch.autograd.Function):
    """The identity of y. Its backward calls ``sink(x, ∇y)``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, end: Tensor, sink: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x)  # so that activation checkpointing can drop and recompute it
        ctx.sink = sink
        return y.detach()  # not y: models may change their own activations in place

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[None, Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.sink(x, grad_y)
        return None, grad_y, None, None


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, except modules that checkpoint activations: they do so only in training."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _without_reductions(model: nn.Module) -> Iterator[None]:
    """Without hooks on the modules' backwards.

    ZeRO-3 has such hooks on PEFT's layers. They would reduce gradients of A and B that are not
    there, and expect to run for all layers.
    """
    hooked = {module: module._backward_hooks for module in model.modules()}
    try:
        for module in hooked:
            module._backward_hooks = OrderedDict()
        yield
    finally:
        for module, hooks in hooked.items():
            module._backward_hooks = hooks
