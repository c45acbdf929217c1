"""Functions that ranks run in tests/methods/init/test_gradients.py."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError
from scalora_dist.methods.init.gradients import rehearse, weight_gradients
from scalora_dist.methods.init.groups import Budget
from scalora_dist.training.trainer import Trainer
from tests.support import runs
from tests.support.batches import arrays

Rows = dict[str, tuple[int, tuple[int, int], np.ndarray]]  # name: (offset, shape, flat range)


class Found(NamedTuple):
    """The results of one call of ``weight_gradients`` on one rank."""

    rows: Rows
    batches: list[dict[str, np.ndarray]]  # of one pass
    forwards: int
    blocks: int  # forwards of the first block, with those of gradient checkpointing
    left: list[str]  # state that a pass should not have left behind, as in left_behind
    sent: int  # elements of the largest full gradient
    whole: int  # largest number of full gradients that were alive at once
    passes: list[list[str]]  # layers whose gradients came from each pass


class Messages:
    """Records, inside ``with``, sizes and lifetimes of inputs of ``dist.reduce_scatter_tensor``."""

    def __init__(self) -> None:
        self.sent = self.whole = 0
        self.wholes: list[Any] = []

    def __enter__(self) -> Messages:
        self.patch = pytest.MonkeyPatch()
        self.plain = dist.reduce_scatter_tensor
        self.patch.setattr(dist, "reduce_scatter_tensor", self.reduce_scatter)
        return self

    def __exit__(self, *error: Any) -> None:
        self.patch.undo()

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> None:
        self.wholes.append(weakref.ref(whole))
        alive = [tensor for ref in self.wholes if (tensor := ref()) is not None]
        alive = [tensor for tensor in alive if tensor.untyped_storage().nbytes()]
        self.sent, self.whole = max(self.sent, whole.numel()), max(self.whole, len(alive))
        self.plain(part, whole)


def losses(trainer: Trainer, micro_batches: int) -> Iterator[Tensor]:
    """The losses of the first step's micro-batches, normalised like in the trainer."""
    targets = trainer.feed.batches.target_tokens(0)
    for batch in itertools.islice(trainer.micro_batches(0), micro_batches):
        yield trainer.loss(trainer.model, batch).loss / targets


def gradients(
    world: World, options: dict[str, Any], budgets: list[Budget], loss_scale: float
) -> list[Found]:
    """Compute the weights' gradients with each budget, in turn on the same engine."""
    trainer = runs.make(world, options)
    trainer.engine.module.train()
    forwards: list[int] = []
    blocks: list[int] = []
    trainer.model.register_forward_hook(lambda *_: forwards.append(1))
    trainer.model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: blocks.append(1))
    for module in trainer.model.modules():
        if hasattr(module, "attention_dropout"):  # makes a run in training mode visible
            module.attention_dropout = 0.5
    hooks = count_hooks(trainer.model)
    micro_batches = trainer.options.train.gradient_accumulation_steps
    found = []
    rehearse(
        trainer.model,
        trainer.engine.adapted,
        lambda: losses(trainer, micro_batches=1),
        world,
        release=trainer.engine.release,
        loss_scale=loss_scale,
    )
    assert len(forwards) == 1 and count_hooks(trainer.model) == hooks and not left_behind(trainer)
    for budget in budgets:
        rows: Rows = {}
        passes: dict[int, list[str]] = {}  # {number of forwards so far: layers}
        forwards.clear()
        blocks.clear()
        with Messages() as messages:
            for name, shard in weight_gradients(
                trainer.model,
                trainer.engine.adapted,
                lambda: losses(trainer, micro_batches),
                world,
                release=trainer.engine.release,
                budget=budget,
                loss_scale=loss_scale,
            ):
                assert shard.group is dist.group.WORLD and shard.local.dtype == torch.float32
                rows[name] = (shard.offset, shard.shape, shard.local.numpy().copy())
                passes.setdefault(len(forwards), []).append(name)
                assert count_hooks(trainer.model) == hooks
                assert not left_behind(trainer)
                del shard
        found.append(
            Found(
                rows=rows,
                batches=[
                    arrays(batch)
                    for batch in itertools.islice(trainer.micro_batches(0), micro_batches)
                ],
                forwards=len(forwards),
                blocks=len(blocks),
                left=left_behind(trainer),
                sent=messages.sent,
                whole=messages.whole,
                passes=list(passes.values()),
            )
        )
    return found


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def left_behind(trainer: Trainer) -> list[str]:
    """Modules in evaluation mode; parameters that have a gradient or are gathered."""
    left = [name for name, module in trainer.model.named_modules() if not module.training]
    sharded = any(isinstance(p, DTensor) for p in trainer.model.parameters())
    for name, p in trainer.model.named_parameters():
        gathered = hasattr(p, "ds_id") and p.numel() > 0 and not p.ds_persist
        if p.grad is not None or gathered or (sharded and not isinstance(p, DTensor)):
            left.append(name)
    return left


def train(world: World, options: dict[str, Any], budget: int | None) -> None:
    """Train. With a budget (bytes), compute the weights' gradients before."""

    class Looking(Trainer):
        def start(self) -> Any:
            if budget is not None:
                for _, shard in weight_gradients(
                    self.model,
                    self.engine.adapted,
                    lambda: losses(self, 2),
                    world,
                    release=self.engine.release,
                    budget=Budget(budget),
                ):
                    assert shard.local.abs().sum() > 0
            return super().start()

    runs.make(world, options, Looking).run()


class Linears(nn.Sequential):
    """Two frozen bfloat16 layers. The last has fewer rows than there are ranks."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 7), nn.Linear(7, 1))
        torch.manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p)
        self.requires_grad_(False).to(torch.bfloat16)

    def layers(self) -> dict[str, nn.Module]:
        return dict(self.named_children())


def inputs(rank: int, tokens: int = 1000) -> Tensor:
    return torch.randn(tokens, 5, generator=torch.Generator().manual_seed(rank)).bfloat16()


def sixteen_bit(world: World) -> Rows:
    """∇W of the sum of ``Linears``' outputs over the inputs of all ranks."""
    model = Linears()
    shards = weight_gradients(
        model,
        model.layers(),
        lambda: [model(inputs(world.rank)).float().sum()],
        world,
        release=lambda: None,
        budget=Budget(2**20),
    )
    return {name: (s.offset, s.shape, s.local.numpy()) for name, s in shards}


def other_ways(world: World) -> str:
    """The refusal if ranks' samples go through different layers; checks remaining hooks, modes."""
    model = Linears()
    model[0].eval()  # and the rest in training mode

    def one_loss() -> Iterator[Tensor]:
        yield model[0](inputs(world.rank)).sum() if world.rank else model(inputs(0)).sum()

    try:
        everything = weight_gradients(
            model, model.layers(), one_loss, world, release=lambda: None, budget=Budget(2**20)
        )
        list(everything)
    except UserError as error:
        assert count_hooks(model) == 0
        assert [module.training for module in model.modules()] == [True, False, True]
        return str(error)
    return ""
