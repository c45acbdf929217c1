"""Part rescale: the whole rescale of Gemma-3-12B's layers on one device, without the model.

For the papers' five projections and all seven, r = 8, 16 and 64, in bfloat16 with `split`. The
layers hold random W, A, B, gradients and moments. Where the memory does not hold all blocks, fewer
are measured; a row says how many.
"""

from __future__ import annotations

import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from scalora_dist.config.method import MethodArguments
from scalora_dist.distributed.world import World
from scalora_dist.methods.adamw_direction import AdamWDirection
from scalora_dist.methods.merger import IntoWeights, Merger
from scalora_dist.methods.scalora import Rescaler
from scalora_dist.profiling.clock import Clock, Stopwatch, now
from scalora_dist.training.run_log import write_json
from tools.gpu.gemma import FIVE, SEVEN, projection_shapes, random_layers, text_config
from tools.gpu.part import run_part

RANKS = (8, 16, 64)
SMOKE_RANKS = (8,)
ROUNDS = 3


def blocks_that_fit(shapes: dict[str, tuple[int, int]], blocks: int, device: torch.device) -> int:
    """Blocks whose W and low halves take at most 3/4 of the free memory."""
    if device.type != "cuda":
        return blocks
    free, _ = torch.cuda.mem_get_info(device)
    return min(blocks, int(0.75 * free / (4 * sum(m * n for m, n in shapes.values()))))


def time_rescales(world: World, weights: list[Tensor], rank: int) -> dict[str, Any]:
    """Seconds of a rescale, and of its parts. A part ends when the device is idle."""
    generator = torch.Generator(world.device).manual_seed(0)
    layers = list(random_layers(weights, rank, generator))
    method = MethodArguments(rank=rank)
    rescaler = Rescaler(
        Merger(layers, world, IntoWeights(layers, "split")),
        rule=method.scaling_rule,
        eta_lipschitz=method.eta_l,
        bounds=method.bounds,
        direction=partial(AdamWDirection, betas=(0.9, 0.999), epsilon=1e-8, step=2)
        if method.scaling_rule == "adamw"
        else None,
    )
    rescaler(layers, Clock())
    whole, parts = [], []
    for _ in range(ROUNDS):
        begun = now(world.device)
        rescaler(layers, Clock())
        whole.append(now(world.device) - begun)
        watch = Stopwatch(world.device)
        rescaler(layers, watch)
        watch.end()
        parts.append(watch.seconds)
    medians = {name: median(one[name] for one in parts) for name in parts[0]}
    return {"seconds": median(whole), "parts": medians}


def measure(file: Path, *, smoke: bool) -> None:
    """Measure, and write ``file`` anew after each row."""
    world = World.join(timeout=timedelta(minutes=5))
    config = text_config(smoke=smoke)
    shapes = projection_shapes(config)
    blocks = blocks_that_fit(shapes, config.num_hidden_layers, world.device)
    generator = torch.Generator(world.device).manual_seed(0)
    kept = {
        name: [
            torch.empty(shape, dtype=torch.bfloat16, device=world.device).normal_(
                0, 0.02, generator=generator
            )
            for _ in range(blocks)
        ]
        for name, shape in shapes.items()
    }
    rows: list[dict[str, Any]] = []
    for projections in (FIVE, SEVEN):
        weights = [weight for name in projections for weight in kept[name]]
        for rank in SMOKE_RANKS if smoke else RANKS:
            found = time_rescales(world, weights, rank)
            rows.append(
                {
                    "projections": len(projections),
                    "rank": rank,
                    "blocks": blocks,
                    "layers": len(weights),
                    **found,
                }
            )
            write_json(file, {"rows": rows})
            parts = ", ".join(f"{name} {1e3 * t:.1f}" for name, t in found["parts"].items())
            print(
                f"{len(projections)} projections, r = {rank:<2}, {len(weights)} layers: "
                f"{1e3 * found['seconds']:.1f} ms ({parts})",
                flush=True,
            )
    world.leave()


if __name__ == "__main__":
    # torch renamed collectives that older versions know by their old names only.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    run_part(__doc__, measure)
