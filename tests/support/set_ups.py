"""Trains the set-ups of tools/loss_compare.py on ranks that already run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import runs, tiny_runs
from tests.support.ranks import Ranks
from tools.loss_compare import SetUp, set_ups

SET_UPS = {set_up.name: set_up for set_up in set_ups()}


def train(ranks: Callable[[int], Ranks], set_up: SetUp, inputs: Path, results: Path) -> Path:
    """Train a set-up once, after the one that it resumes from. Returns the folder of its run.

    Args:
        inputs: the folder that ``make_inputs`` filled.
        results: the folder for the folders of all runs.
    """
    folder = results / set_up.name
    if not folder.exists():
        options: dict[str, Any] = set_up.options(inputs)
        options |= set_up.engine_options(runs.REPOSITORY / "ds_configs", inputs)
        options["output_dir"] = folder
        if set_up.resumes:
            before = train(ranks, SET_UPS[set_up.resumes], inputs, results)
            options["resume_from_checkpoint"] = before / "checkpoint-3"
        work = tiny_runs.train_fp16 if "fp16" in set_up.words else tiny_runs.train
        ranks(set_up.ranks).run(work, options)
    return folder
