"""Compares a plan (`scalora plan`) with measurements of a few real steps.

    torchrun --nproc_per_node 2 tools/check_plan.py --fsdp --config launch/recipes/demo.yaml \\
        --model_name_or_path "$(python tools/demo_model.py)" --max_length 256 [--json row.json]

Takes the trainer's options and starts like the trainer, on random tokens. Writes no results. Prints
figures, each of the rank with the largest value:

    tracked     peak of the bytes of live tensors in a step
    grams, compression, merge
                the same in these parts of a rescale
    staged      bytes of the copies that a save makes on the host
    peak        peak memory of the process in a step: on a CPU resident memory, above that before
                the model was loaded; on a GPU the allocator's peak
    gathered    bytes of weights and factors that all-gathers filled
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from scalora_dist.config.option import JsonFile
from scalora_dist.config.options import Options
from scalora_dist.config.parser import parse_options
from scalora_dist.config.words import Parser
from scalora_dist.distributed.world import World
from scalora_dist.engines.build import join
from scalora_dist.errors import exit_with_one_sentence
from scalora_dist.planning.arguments import PlanArguments
from scalora_dist.planning.measured import STEPS, MeasuredTrainer
from scalora_dist.planning.planner import Planner
from scalora_dist.profiling.memory import restart_peak
from scalora_dist.training.run_log import write_json

MB = 1e6


def measure(options: Options, world: World) -> dict[str, float]:
    """The measured figures in bytes, the largest of any rank. Collective."""
    restart_peak(world.device)  # forgets the peak of the imports
    before = restart_peak(world.device) or 0
    trainer = MeasuredTrainer(options, world)
    trainer.run()
    peak = float("nan") if trainer.peak is None else float(trainer.peak)
    if world.device.type != "cuda":  # CUDA's allocator counts only the run's own tensors
        peak -= before
    found = {
        "tracked": trainer.tracked,
        **trainer.phases,
        "staged": trainer.staged,
        "peak": peak,
        "gathered": trainer.traffic.gathered,
    }
    return dict(zip(found, world.max(*found.values()), strict=True))


def compare(options: Options, world: World, found: dict[str, float]) -> dict[str, Any]:
    plan = Planner(options, PlanArguments()).plan(options, world.size)
    planned = {moment.phase: moment.total for moment in plan.phases}
    planned |= {"tracked": plan.peak.total, "peak": plan.peak.total}
    planned |= {"staged": plan.staged, "gathered": plan.gathered}
    return {name: {"measured": found[name], "planned": planned[name]} for name in found}


def main(argv: list[str]) -> None:
    given, words = Parser([JsonFile], allow_abbrev=False).parse_args_into_dataclasses(
        argv, return_remaining_strings=True
    )
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--max_steps", str(STEPS), "--eval_size", "0", "--save_steps", "0"]
        fixed += ["--save_model", "false", "--output_dir", folder]
        options = parse_options([*words, *fixed])
        world = join(options)
        shared = world.exchange(folder)[0]  # a run has one folder
        found = measure(options.having(output_dir=shared), world)
    world.leave()
    if not world.is_main:
        return
    rows = compare(options, world, found)
    for name, row in rows.items():
        if row["measured"] > 1e4:  # leave out the few bytes that one process gathers
            measured, planned = row["measured"] / MB, row["planned"] / MB
            off = planned / measured - 1
            print(f"{name:>11}: {measured:9.1f} MB, planned {planned:9.1f} ({off:+.1%})")
    if given.json:
        write_json(Path(given.json), rows)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    with exit_with_one_sentence():
        main(sys.argv[1:])
