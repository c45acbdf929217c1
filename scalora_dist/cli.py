"""The command ``scalora``: train, plan, compare, check machines and checkpoints, compute figures.

Signals count from the first moment, before the seconds that the imports take. The options are read
and checked before torch's distributed parts and DeepSpeed are imported.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from scalora_dist.distributed.stop_signals import StopSignals
from scalora_dist.errors import UserError, exit_with_one_sentence, is_rank_0

if TYPE_CHECKING:
    from scalora_dist.config.options import Options

# The modules of pyproject.toml's dependencies.
LIBRARIES = (
    "accelerate",
    "datasets",
    "deepspeed",
    "huggingface_hub",
    "numpy",
    "psutil",
    "safetensors",
    "tensorboard",
    "torch",
    "tqdm",
    "transformers",
    "yaml",
)
# Those of the extra `compare`.
OF_EXTRAS = {"compare": ("matplotlib", "scipy"), "reproduce": ("matplotlib",)}
COMMANDS = ("train", "plan", "doctor", "checkpoint", "export", "compare", "reproduce")
USAGE = """usage: scalora COMMAND [--option value ...]

  scalora train       fine-tune a model
  scalora plan        what a run will need: memory, messages, least times
  scalora doctor      check the machine, the network between the ranks, and the engines
  scalora checkpoint  what is in a checkpoint, and whether it is sound
  scalora export      write the model or the adapter of a checkpoint
  scalora compare     compare methods: a study of learning rates and seeds
  scalora reproduce   compute figures of the ScaLoRA paper on a CPU

scalora COMMAND --help lists a command's options. On several ranks, let a launcher start it:
  deepspeed --num_gpus N --module scalora_dist train --ds_config zero3 ...
  torchrun --nproc_per_node N -m scalora_dist train --fsdp ..."""


def main(argv: Sequence[str] | None = None) -> None:
    """What every rank of a launched run calls. Mistakes end it with one sentence and status 2.

    Args:
        argv: the command and its options; by default those of the process.
    """
    level = logging.INFO if is_rank_0() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    for name in ("httpx", "httpx2"):  # of huggingface_hub: one line for each request to a hub
        logging.getLogger(name).setLevel(logging.WARNING)
    # Renamed functions that DeepSpeed, or the oldest transformers we run with, has by the old name.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with StopSignals() as signals, exit_with_one_sentence(signals.ignore):
        command, words = split(sys.argv[1:] if argv is None else argv)
        if command != "help":
            check_libraries(command)
        if command == "train":
            train(words, signals)
        elif command == "plan":
            plan(words)
        elif command == "doctor":
            doctor(words)
        elif command == "checkpoint":
            checkpoint(words)
        elif command == "export":
            signals.advice = "delete the folder *.partial, if it is there, and start it again"
            export(words)
        elif command == "compare":
            compare(words, signals)
        elif command == "reproduce":
            reproduce(words)
        else:
            print(USAGE)
        signals.outlast()


def split(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command and its options. DeepSpeed's launcher puts ``--local_rank=N`` before both.

    Raises:
        UserError: there is no such command.
    """
    first = [word for word in words if not word.startswith("--local_rank=")][:1]
    if first in ([], ["--help"], ["-h"]):
        return "help", []
    if first[0] not in COMMANDS:
        raise UserError(
            f"scalora {first[0]}: choose one of {', '.join(COMMANDS)}; scalora --help explains"
        )
    rest = list(words)
    rest.remove(first[0])
    return first[0], rest


def check_libraries(command: str) -> None:
    """Look for the libraries without importing them: in a clone without an install none is there.

    Raises:
        UserError: one is missing.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: not installed for {sys.executable}; run `make setup` and "
            "`. .venv/bin/activate`, or follow docs/install.md"
        )
    missing = [name for name in OF_EXTRAS.get(command, ()) if find_spec(name) is None]
    if missing:
        raise UserError(
            f"scalora {command} needs the extra `compare`: pip install {' '.join(missing)}"
        )


def train(words: Sequence[str], signals: StopSignals) -> None:
    """Train and print the summary; with ``--dry_run``, plan the run on the ranks that are here
    (and show examples, if asked to).

    Args:
        words: the options.
        signals: what handles requests to stop; already entered.
    """
    if "0" not in (os.environ.get("LOCAL_RANK", "0"), os.environ.get("RANK", "0")):
        # The first rank of each node asks the hub for all (`World.node_first`). The libraries read
        # this when they are imported.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from scalora_dist.config.parser import parse_options

    options = parse_options(words)
    if options.launch.dry_run:
        from scalora_dist.planning.report import report, where_we_are

        if is_rank_0():
            print(report(options, where_we_are()))
            if options.data.show_examples:
                from scalora_dist.training.feed import show_data

                show_data(options)
        return
    signals.output_dir = Path(str(options.train.output_dir))
    run(options, signals)


def run(options: Options, signals: StopSignals) -> None:
    """Train on the launcher's ranks, and print the summary."""
    from scalora_dist.engines.build import join
    from scalora_dist.training.summary import render
    from scalora_dist.training.trainer import Trainer

    world = join(options)
    signals.share(world)
    summary = Trainer(options, world, signals).run()
    if world.is_main:
        print(f"\n{render(summary)}")
    world.leave()


def plan(words: Sequence[str]) -> None:
    """Print what a run will need on a cluster that the options describe."""
    from transformers import logging as transformers_logging

    from scalora_dist.planning.arguments import parse_plan
    from scalora_dist.planning.report import report

    transformers_logging.set_verbosity_error()
    where, options = parse_plan(words)
    print(report(options, where))


def doctor(words: Sequence[str]) -> None:
    """Print a table of checks on the launcher's ranks; status 1 if one of them fails."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    from scalora_dist.doctor.command import doctor_command

    doctor_command(words)


def checkpoint(words: Sequence[str]) -> None:
    """Print what is in a checkpoint, in one process; status 1 if it is damaged."""
    from scalora_dist.checkpoint.command import checkpoint_command

    checkpoint_command(words)


def export(words: Sequence[str]) -> None:
    """Write the model or the adapter of a checkpoint, in one process."""
    from scalora_dist.export.command import export_command

    export_command(words)


def compare(words: Sequence[str], signals: StopSignals) -> None:
    """Run a study of methods, or go on with it.

    Args:
        words: the study's file and the options.
        signals: what handles requests to stop; already entered.
    """
    from scalora_dist.compare.command import compare_command

    compare_command(words, signals)


def reproduce(words: Sequence[str]) -> None:
    """Compute a figure of the ScaLoRA paper, in one process."""
    from scalora_dist.reproduce.command import reproduce_command

    reproduce_command(words)
