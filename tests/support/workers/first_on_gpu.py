"""Functions that ranks run in tests/gpu: on the ranks' device, against float64 on the CPU."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from scalora_dist.checkpoint.parts import FlatPart, stage
from scalora_dist.config.method import MergeRounding
from scalora_dist.core.layout import Layout
from scalora_dist.core.scale_solver import Scales
from scalora_dist.core.split_precision import join_halves
from scalora_dist.data.collate import batch_of
from scalora_dist.data.prompts import IGNORE
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards, factor_shards
from scalora_dist.layers.fourbit_linear import FourBit, FourBitLinear
from scalora_dist.methods.init.gradients import rehearse, weight_gradients
from scalora_dist.methods.init.groups import Budget
from scalora_dist.methods.init.room import free_room
from scalora_dist.methods.merger import IntoWeights, Merger
from scalora_dist.methods.scalora import Rescaler, scale_factors_
from scalora_dist.modeling import loss as loss_module
from scalora_dist.modeling.loss import LossHead
from scalora_dist.profiling.clock import Clock
from tests.support import runs, toy
from tests.support.reference import relative_error
from tools.gpu.gemma import random_layers
from tools.gpu.merge import KINDS, other_bits

SHAPES = [(384, 256), (256, 640)]
RANK = 8


def layers_of(world: World, dtype: torch.dtype) -> list[LayerShards]:
    generator = torch.Generator(world.device).manual_seed(0)
    weights = [
        torch.randn(shape, generator=generator, device=world.device).to(dtype) for shape in SHAPES
    ]
    return list(random_layers(weights, RANK, generator))


def whole(shard: Any) -> Tensor:
    """A full matrix, float64, on the CPU."""
    return torch.from_numpy(toy.whole(shard, shard.local.device))


def off(found: Tensor, true: Tensor) -> float:
    """The relative error in the Frobenius norm."""
    return relative_error(found.double().cpu().numpy(), true.numpy())


def device_of(world: World) -> str:
    return world.device.type


def collectives(world: World) -> dict[str, Any]:
    """The collectives of ``World``, of float64, int64 and bytes."""
    rows = torch.tensor([[world.rank, 7]], dtype=torch.int64)
    return {
        "backend": dist.get_backend(),
        "sum": world.sum(1.0, float(world.rank)),
        "max": world.max(float(world.rank)),
        "agree": [world.agree(3.0), world.agree(float(world.rank))],
        "rows": world.gather_rows(rows).tolist(),
        "first": float(world.from_rank_0(torch.tensor(5.0 + world.rank, dtype=torch.float64))),
    }


def grams(world: World) -> float:
    """The largest error of a layer's [A,∇A]ᵀ[A,∇A] or [B,∇B]ᵀ[B,∇B]."""
    layers = layers_of(world, torch.bfloat16)
    rescaler = Rescaler(
        Merger(layers, world, IntoWeights(layers, "split")),
        rule="paper",
        eta_lipschitz=0.5,
        bounds=None,
    )
    found = rescaler.grams(layers)
    errors = []
    for i, layer in enumerate(layers):
        for gram, pair in zip(
            found, ((layer.A, layer.grad_A), (layer.B, layer.grad_B)), strict=True
        ):
            stacked = torch.cat([whole(shard) for shard in pair], dim=1)
            errors.append(off(gram[i], stacked.T @ stacked))
    return max(errors)


def merge(world: World, dtype: torch.dtype, rounding: MergeRounding) -> tuple[float, float]:
    """One merge: the largest error of W, and of W's increment, of any layer.

    W is what the weight stands for: in ``split`` with its low half.
    """
    layers = layers_of(world, dtype)
    target = IntoWeights(layers, rounding)
    weights = 1 + torch.rand(len(layers), RANK, dtype=torch.float64)
    before = [whole(layer.W) for layer in layers]
    Merger(layers, world, target)(layers, weights, Clock())
    errors = []
    for layer, scale, start in zip(layers, weights, before, strict=True):
        W = layer.W
        if (low := target.low_halves.get(f"{layer.name}.weight")) is not None:
            W = W.like(join_halves(W.local, low))
        increment = layer.scaling * (whole(layer.A) * scale) @ whole(layer.B).T
        errors.append((off(whole(W), start + increment), off(whole(W) - start, increment)))
    return max(e for e, _ in errors), max(e for _, e in errors)


def merge_kernel(world: World) -> int:
    """How many numbers a GPU's merge kernel and PyTorch's operators round to other bits."""
    cases = itertools.product(SHAPES, KINDS, (1, 3, RANK, 64))
    return sum(other_bits(shape, kind, rank, world.device) for shape, kind, rank in cases)


def scale(world: World) -> float:
    """The largest error of a factor, gradient or moment after it is scaled."""
    layers = layers_of(world, torch.bfloat16)
    drawn = 0.5 + torch.rand(2, len(layers), RANK, dtype=torch.float64)
    names = {"A": 0, "grad_A": 1, "B": 1, "grad_B": 0}  # 0: by α, 1: by β
    before = [{name: whole(getattr(layer, name)) for name in names} for layer in layers]
    moments = [[whole(x) for x in (*layer.moments_A, *layer.moments_B)] for layer in layers]
    scales = Scales(drawn[0], drawn[1], torch.ones(len(layers), dtype=torch.int64))
    scale_factors_(layers, scales, Layout.of(factor_shards(layers), world.device))
    errors = []
    for i, layer in enumerate(layers):
        for name, side in names.items():
            errors.append(off(whole(getattr(layer, name)), before[i][name] * drawn[side, i]))
        powers = (drawn[1, i], drawn[1, i] ** 2, drawn[0, i], drawn[0, i] ** 2)
        for moment, old, power in zip(
            (*layer.moments_A, *layer.moments_B), moments[i], powers, strict=True
        ):
            errors.append(off(whole(moment), old * power))
    return max(errors)


def staging(world: World) -> tuple[bool, bool]:
    """(whether staged copies are pinned, whether they hold what was there when staged)."""
    values = torch.randn(1000, device=world.device)
    expected = values.cpu().clone()
    staged = stage({"x": FlatPart(values, 0, len(values))})["x"].local
    values.zero_()  # training goes on
    return staged.is_pinned(), torch.equal(staged, expected)


def fourbit(world: World, dtype: torch.dtype) -> dict[str, float]:
    """Errors of a 4-bit layer's output and input gradient, and of its numbers from a CPU's."""
    torch.manual_seed(0)
    linear = nn.Linear(192, 160, dtype=dtype, device=world.device)
    bias = linear.bias.detach().double().cpu()
    layer = FourBitLinear.quantize(linear, FourBit("nf4", True, dtype, torch.uint8))
    dense = layer.dense(layer.weight, torch.float32)
    x = torch.randn(24, 192, device=world.device).to(dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    true = dense.double().cpu()
    assert x.grad is not None
    on_cpu = layer.cpu().dense(layer.weight, torch.float32)
    return {
        "output": off(y.detach(), x.detach().double().cpu() @ true.T + bias),
        "gradient": off(x.grad, true.sum(0).expand(24, -1)),
        "numbers": off(dense, on_cpu.double()),
    }


def liger(world: World) -> dict[str, float]:
    """Errors of Liger's loss and of its gradient from those of our chunks."""
    torch.manual_seed(0)
    head = nn.Linear(256, 4099, bias=False, dtype=torch.bfloat16, device=world.device)
    head.requires_grad_(False)
    head.__class__ = LossHead
    assert isinstance(head, LossHead)
    ids = torch.randint(4099, (4, 96))
    labels = ids.clone()
    labels[:, :9] = IGNORE
    batch = batch_of(ids, labels).to(world.device)
    hidden = torch.randn(4, 96, 256, device=world.device).bfloat16()
    found = []
    for device_type in ("cuda", "no device"):
        before, loss_module.FOR_LIGER = loss_module.FOR_LIGER, device_type
        states = hidden.clone().requires_grad_()
        try:
            with head.expecting(batch):
                loss = head(states)[0, 0, 0]
                assert (head.right is None) and loss.requires_grad
            loss.backward()
        finally:
            loss_module.FOR_LIGER = before
        assert states.grad is not None
        found.append((loss.detach(), states.grad))
    (theirs, their_gradient), (ours, our_gradient) = found
    return {
        "loss": off(theirs, ours.double().cpu()),
        "gradient": off(their_gradient, our_gradient.double().cpu()),
    }


def attention(world: World, folder: Path, implementation: str) -> float:
    """The error of a bf16 model's logits from those of eager attention in float32."""
    ids = torch.randint(200, (2, 64), generator=torch.Generator().manual_seed(0))
    ids = ids.to(world.device)
    found = []
    for name, dtype in (("eager", torch.float32), (implementation, torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=name
        ).to(world.device)
        assert model.config._attn_implementation == name
        with torch.no_grad():
            found.append(model.eval()(ids).logits)
    return off(found[1], found[0].double().cpu())


def pinned_weights(world: World, case: dict[str, Any]) -> list[bool]:
    """Train. For each adapted layer: whether its shard of W is in pinned memory on the host."""
    trainer = runs.make(world, case)
    trainer.run()
    layers = trainer.engine.layer_shards(gradients=False)
    return [layer.W.local.device.type == "cpu" and layer.W.local.is_pinned() for layer in layers]


def sums_of_a_start(world: World, options: dict[str, Any]) -> tuple[float, Budget, int]:
    """The largest relative error of a first gradient with sums on the host.

    Also the room for the sums as it is measured, and the free bytes of the device then.
    """
    trainer = runs.make(world, options)
    engine, samples = trainer.engine, trainer.feed.samples(trainer.loss, trainer.model)

    def sums(budget: Budget) -> dict[str, Tensor]:
        found = weight_gradients(
            trainer.model, engine.adapted, samples, world, release=engine.release, budget=budget
        )
        return {name: rows.local.clone() for name, rows in found}

    true, found = sums(Budget(device=2**30)), sums(Budget(host=2**30))
    errors = [off(rows, true[name].double().cpu()) for name, rows in found.items()]
    assert all(rows.device.type == world.device.type for rows in found.values())
    del true, found
    room = free_room(
        lambda: rehearse(
            trainer.model, engine.adapted, samples.longest, world, release=engine.release
        ),
        world,
    )
    free = torch.cuda.mem_get_info()[0] if world.device.type == "cuda" else 0
    trainer.close()
    return max(errors), room, free
