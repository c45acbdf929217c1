"""One way of training a model, step by step: time, tokens/s, MFU, peak memory beside the plan's.

    python -m tools.gpu.step WAY --folder FOLDER --json FILE [--engine zero2 …]

FOLDER holds a model and texts.jsonl, as `tools/gpu/steps.py` writes them. Starts like the trainer,
also under torchrun, and takes the trainer's steps. ScaLoRA rescales at every second step. So steps
with a rescale and without one alternate, and other load affects both alike.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scalora_dist.config.options import Options
from scalora_dist.config.parser import parse_options
from scalora_dist.distributed.world import World
from scalora_dist.engines.build import join
from scalora_dist.planning.arguments import PlanArguments
from scalora_dist.planning.planner import Planner
from scalora_dist.profiling.clock import now
from scalora_dist.profiling.memory import restart_peak
from scalora_dist.training.run_log import write_json
from scalora_dist.training.step_profile import flops_of, peak_of
from scalora_dist.training.trainer import Trainer
from tools.gpu.gemma import SEVEN

RANK = 8
WARM_UP = 2  # steps that are not timed: they make the optimizer's state and what the engine keeps
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "scalora": {"method": "scalora", "scaling_interval": 2},
    "peft-lora": {"method": "peft-lora"},
    "scalora-nf4": {"method": "scalora", "scaling_interval": 2, "load_in_4bit": True},
}


def options_of(way: str, folder: Path, output: Path, args: argparse.Namespace) -> Options:
    """The trainer's options, with everything in them that costs no step turned off."""
    given: dict[str, Any] = {
        "model_name_or_path": folder,
        "dataset": folder / "texts.jsonl",
        "output_dir": output,
        "max_length": args.length,
        "train_batch_size": args.examples,
        "per_device_train_batch_size": args.micro_batch,
        "max_steps": WARM_UP + args.steps,
        "rank": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "target_modules": " ".join(SEVEN),
        "bf16": True,
        "gradient_checkpointing": True,
        "save_steps": 0,
        "save_model": False,
        "update_rank_layers": 0,
        **WAYS[way],
    }
    if args.engine == "fsdp":
        given["fsdp"] = True
    elif args.engine != "local":
        given["ds_config"] = args.engine
    return parse_options([w for k, v in given.items() for w in (f"--{k}", *str(v).split())])


def time_steps(world: World, steps: int, take: Callable[[int], None]) -> dict[str, Any]:
    """Take ``steps`` steps. Returns the times and the peak memory of those after ``WARM_UP``.

    Each is of the slowest or largest rank. Collective.

    Args:
        take: takes the step with this number, counted from 0.
    """
    device, seconds = world.device, []
    for step in range(steps):
        if step == WARM_UP:
            restart_peak(device)
        world.sum(0.0)  # the ranks begin together
        begun = now(device)
        take(step)
        seconds.append(world.max(now(device) - begun)[0])
    # First: the allocator restarts both of its counts together.
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    peak, reserved = map(int, world.max(restart_peak(device) or 0, reserved))
    return {"seconds": seconds[WARM_UP:], "peak_bytes": peak, "reserved_bytes": reserved}


def measure(options: Options, world: World) -> dict[str, Any]:
    """Take the trainer's steps and return their figures. Collective."""
    trainer = Trainer(options, world)
    options = trainer.options
    batches = trainer.start()
    trainer.engine.module.train()
    records: list[dict[str, Any]] = []
    timed = time_steps(
        world, trainer.feed.steps, lambda step: records.append(trainer.take_step(step, batches)[0])
    )
    train, length = options.train, options.data.max_length
    flops = flops_of(options, trainer.runner)
    micro_batch = train.per_device_train_batch_size
    work = flops.step(micro_batch, length, micro_batch * (length - 1)) if flops else None
    trainer.close()
    return {
        **timed,
        "rescaled": ["rescale" in record for record in records[WARM_UP:]],
        "losses": [record["loss"] for record in records],
        "grad_norms": [record["grad_norm"] for record in records],
        "tokens": records[-1]["tokens"],
        "flops": work and work * train.gradient_accumulation_steps,
        "peak_tflops": peak_of(options, world.device),
        "low_half_bytes": sum(low.nbytes for low in trainer.runner.low_halves.values()),
    }


def step_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folder", type=Path, required=True, help="of the model and texts.jsonl")
    parser.add_argument("--json", type=Path, required=True, help="the file of the figures")
    parser.add_argument("--engine", default="zero2", help="a config of ds_configs/, fsdp or local")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--examples", type=int, default=64, help="in a step, of all ranks")
    parser.add_argument("--micro_batch", type=int, default=8, help="examples of a rank at once")
    parser.add_argument("--length", type=int, default=256, help="tokens of an example")
    return parser


def main() -> None:
    parser = step_parser(__doc__)
    parser.add_argument("way", choices=WAYS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as output:
        options = options_of(args.way, args.folder, Path(output), args)
        world = join(options)
        found = measure(options, world)
    plan = Planner(options, PlanArguments()).plan(options, world.size)
    if world.is_main:
        write_json(args.json, {**found, "ranks": world.size, "planned_bytes": plan.peak.total})
    world.leave()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
