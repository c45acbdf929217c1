"""Measures the cost of a checkpoint: how long training pauses, and how much is written.

    deepspeed --num_gpus 2 tools/bench_checkpoint.py --rounds 5 [--json out.json] \\
        --ds_config ds_configs/zero3.json --config launch/recipes/demo.yaml \\
        --model_name_or_path MODEL --output_dir FOLDER

Takes the options of launch/train.py, with any launcher and engine. A round consists of: a step
with no save running, a save, a step that begins while this save is being written, and, when it is
on disk, a second save with a wait for its end. All durations are those of the slowest rank. The
checkpoints are deleted at the end.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from scalora_dist.checkpoint.manifest import checkpoint_folder, prune
from scalora_dist.config.options import Options
from scalora_dist.config.parser import parse_options
from scalora_dist.errors import UserError, exit_with_one_sentence
from scalora_dist.training.run_log import write_json


def measure(options: Options, rounds: int) -> dict[str, Any]:
    """Run ``rounds`` rounds; the figures in seconds and bytes, the same on every rank.

    Durations are medians over the rounds.
    """
    from scalora_dist.engines.build import join
    from scalora_dist.training.trainer import Trainer

    world = join(options)
    trainer = Trainer(options, world)
    batches, checkpoints = trainer.micro_batches(0), trainer.checkpoints
    steps = 0

    def timed(work: Callable[[], object]) -> float:
        world.sum(0.0)  # a barrier: all ranks start together
        started = time.perf_counter()
        work()
        return world.max(time.perf_counter() - started)[0]

    def step() -> None:
        nonlocal steps
        trainer.take_step(steps, batches)
        steps += 1

    def wait() -> None:
        if failure := checkpoints.outcome(wait=True):
            raise UserError(failure)

    def save() -> None:
        trainer.state.save(checkpoints, steps, trainer.progress.state())

    def save_and_wait() -> None:
        save()
        wait()

    step()  # the first step creates kernels, buffers and moments
    save_and_wait()
    seconds: dict[str, list[float]] = {"step": [], "save": [], "step_beside": [], "write": []}
    for _ in range(rounds):
        seconds["step"].append(timed(step))
        seconds["save"].append(timed(save))
        seconds["step_beside"].append(timed(step))
        wait()
        seconds["write"].append(timed(save_and_wait))
    trainer.watchdog.close()
    figures: dict[str, Any] = {name: median(values) for name, values in seconds.items()}
    folder = checkpoint_folder(checkpoints.output_dir, steps)
    parts = (trainer.state.parts() | trainer.state.random_parts()).values()
    figures |= {
        "world_size": world.size,
        "engine": type(trainer.engine).__name__,
        "bytes_of_state": int(world.sum(sum(part.local.nbytes for part in parts))[0]),
        "bytes_written": sum(path.stat().st_size for path in folder.iterdir()),
        "share_of_step": median(
            save / step for save, step in zip(seconds["save"], seconds["step"], strict=True)
        ),
        "slower_beside": median(
            beside / step
            for beside, step in zip(seconds["step_beside"], seconds["step"], strict=True)
        ),
    }
    world.sum(0.0)  # a barrier: all ranks have read the folder
    if world.is_main:
        prune(checkpoints.output_dir, keep=0)
    world.leave()
    return figures


def render(figures: dict[str, Any]) -> str:
    state, written = figures["bytes_of_state"], figures["bytes_written"]
    rows = {
        "a step": f"{figures['step'] * 1e3:.0f} ms",
        "training stands still": (
            f"{figures['save'] * 1e3:.0f} ms, {figures['share_of_step']:.1%} of a step"
        ),
        "a step while it is written": f"{figures['slower_beside']:.2f} times as long",
        "a save, until it is on disk": f"{figures['write'] * 1e3:.0f} ms",
        "written": f"{written / 2**20:.1f} MiB, {written / state:.4f} of the state's bytes",
    }
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


if __name__ == "__main__":
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--rounds", type=int, default=5)
    own.add_argument("--json", type=Path)
    with exit_with_one_sentence():
        args, words = own.parse_known_args(sys.argv[1:])
        if args.rounds < 1 or (args.json and not args.json.parent.is_dir()):
            raise UserError(
                "set --rounds to at least 1, and --json to a file in an existing folder"
            )
        result = measure(parse_options(words), args.rounds)
        if is_main:
            print(f"\n{render(result)}")
            if args.json:
                write_json(args.json, result)
