"""The gradient of the loss with respect to frozen, sharded weights, one row range per rank."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError


def weight_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    losses: Callable[[], Iterable[Tensor]],
    world: World,
    *,
    release: Callable[[], object],
    budget_bytes: int,
    loss_scale: float = 1.0,
) -> Iterator[tuple[str, FlatShard]]:
    """This rank's rows of each layer's ∇W, summed over all micro-batches and ranks, layer by layer.

    The layers are taken in groups whose sums fit ``budget_bytes`` on this rank (at least one layer
    each), with one pass over the samples per group. Besides those sums a rank holds the whole
    gradient of one micro-batch of one layer. No parameter gets a gradient, so nothing that an
    engine hung on parameters runs; weights are gathered and freed by the hooks it put on modules.

    The model runs in evaluation mode, without dropout, but for the flag that lets transformers
    checkpoint activations where that was asked for. Between two layers it is as it was.

    Args:
        model: what ``layers`` are part of; only its modes are changed.
        layers: in model order. Anything with ``out_features`` m and ``in_features`` n whose input
            (…, n) and output (…, m) are W's, possibly with something added that is linear in A = 0.
        losses: one pass over this rank's samples: yields scalars whose sum over micro-batches and
            ranks is the loss, each after ONE forward. They must come from ``model`` itself
            (DeepSpeed's engine would prepare a step of its own), be as many on every rank (times 0
            where samples run out), and not be kept, for each holds its activations.
        release: called after each backward: ``Engine.release``.
        loss_scale: what losses are multiplied by and sums divided by, for a backward in float16.
            Non-finite sums mean that it was too large.

    Yields:
        (name, rows): ceil(m / world) whole rows per rank as torch.chunk cuts them, float32, cut
        over the group of all ranks, whatever the engine's own sharding of W is.

    Raises:
        UserError: on every rank, where the ranks' samples go through different layers.
    """
    groups = list(_groups(layers, world, budget_bytes))
    with tqdm(
        desc="gradients of the weights",
        unit="batch",
        disable=None if world.is_main else True,
        leave=False,
    ) as progress:
        for number, group in enumerate(groups, 1):
            progress.set_postfix_str(f"pass {number} of {len(groups)}")
            with _without_dropout(model), _Taps(group, world) as taps:
                for loss in losses():
                    taps.backward(loss * loss_scale)
                    del loss  # the activations of layers before the group's first hang on it
                    release()
                    progress.update()
            progress.total = progress.n // number * len(groups)
            for name in list(group):
                yield name, group.pop(name).shard(loss_scale)


class _Rows:
    """The rows of one layer's ∇W (m, n) that this rank sums up; nothing is allocated before."""

    def __init__(self, layer: nn.Module, world: World) -> None:
        # Not from the weight, whose own shape is empty under ZeRO-3.
        self.layer = layer
        self.world = world
        self.shape = m, n = int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
        self.share = ceil_div(m, world.size)
        self.bytes = 4 * self.share * n
        self.sum: Tensor | None = None  # (share, n) float32, the last ranks' padded

    def add(self, x: Tensor, grad_y: Tensor) -> None:
        """Add all ranks' ``grad_yᵀ x``: one reduce-scatter.

        Args:
            x: (…, n), grad_y: (…, m) of any float dtype, this rank's.
        """
        m, n = self.shape
        whole = torch.zeros(self.world.size * self.share, n, device=x.device)
        rows, x = grad_y.flatten(0, -2).float(), x.flatten(0, -2).float()
        torch.mm(rows.T, x, out=whole[:m])
        part = whole.new_empty(self.share, n)
        dist.reduce_scatter_tensor(part, whole)
        whole.untyped_storage().resize_(0)  # gloo's threads hold their last messages for long
        self.sum = part if self.sum is None else self.sum.add_(part)

    def shard(self, loss_scale: float) -> FlatShard:
        m, n = self.shape
        start = min(self.world.rank * self.share, m)
        end = min(start + self.share, m)
        if self.sum is None:  # no sample reached this layer
            self.sum = torch.zeros(self.share, n, device=self.world.device)
        rows = self.sum.div_(loss_scale)[: end - start]
        return FlatShard(rows.view(-1), start * n, self.shape, dist.group.WORLD)


def _groups(
    layers: Mapping[str, nn.Module], world: World, budget_bytes: int
) -> Iterator[dict[str, _Rows]]:
    """Runs of consecutive layers whose sums fit the budget, or that have one layer only."""
    group: dict[str, _Rows] = {}
    for name, layer in layers.items():
        one = _Rows(layer, world)
        if group and sum(other.bytes for other in group.values()) + one.bytes > budget_bytes:
            yield group
            group = {}
        group[name] = one
    if group:
        yield group


class _Taps:
    """Forward hooks that put a tap on the output of each layer of a group."""

    def __init__(self, group: Mapping[str, _Rows], world: World) -> None:
        self.group = group
        self.world = world
        # Backward walks from the loss to this, through all taps and no further: to no parameter.
        self.end = torch.zeros((), device=world.device, requires_grad=True)
        self.reached: list[str] = []  # by the last forward

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
        """Have every tap add its share of ``loss``, the first since the last backward."""
        # Each tap is a collective: where the ranks' taps differ they would wait for each other.
        if not self.world.agree(zlib.crc32(" ".join(self.reached).encode())):
            raise UserError(
                "the ranks' samples go through different layers (experts?): "
                "leave those out of --target_modules"
            )
        torch.autograd.grad(loss, self.end, allow_unused=True)
        self.reached.clear()


class _Tap(torch.autograd.Function):
    """The identity of y, whose backward hands x and ∇y to a sink."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, y: Tensor, end: Tensor, sink: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x)  # which activation checkpointing drops and computes again
        ctx.sink = sink
        return y.detach()  # not y: models may change their own activations in place

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[None, Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        ctx.sink(x, grad_y)
        return None, grad_y, None, None


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but for modules that checkpoint activations, as they do in training only."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
