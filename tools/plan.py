"""What a run will need on a cluster: memory by part, messages, least times; and whether it fits.

    python tools/plan.py --model google/gemma-3-12b-pt --nodes 2 --gpus_per_node 8 --gpu h100-80g \\
        --ds_config ds_configs/zero3.json --method scalora --rank 8 --bf16 \\
        --per_device_train_batch_size 4 --max_length 1024

The options of the run are the trainer's own (also from `--config RECIPE.yaml`). No weights are
loaded and no GPU is needed: the model is built on the meta device, and one micro-batch of it is
traced on tensors without storage.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from transformers import logging as transformers_logging

from scalora_dist.config import Options, Parser, parse_options
from scalora_dist.errors import UserError, exit_with_one_sentence
from scalora_dist.metrics import write_json
from scalora_dist.planning.arguments import PlanArguments, config_folder
from scalora_dist.planning.floors import floors_of
from scalora_dist.planning.planner import Planner
from scalora_dist.planning.table import as_json, describe, render, verdict


def main(argv: list[str]) -> None:
    where, options = parse(argv)
    planner = Planner(options, where)
    plan = planner.plan(options, where.gpus)
    options.train.settle_batch(where.gpus)
    floors, fits = floors_of(plan, where), planner.fits(plan)
    print(f"{describe(options, where)}\n\n{render(plan, floors, options, where)}\n")
    print(verdict(plan, fits, where))
    if not fits:
        change = planner.what_to_change()
        print(
            f"  with {change[0]}: {change[1].peak.total / 2**30:.1f} GiB"
            if change
            else "  nothing known here makes it fit on these GPUs: take more, or larger ones"
        )
    if smallest := planner.smallest():
        gpus, words, small = smallest
        given = f" with {words}" if words else ""
        print(
            f"smallest set-up that fits: {gpus} × {where.gpu}{given}, "
            f"{small.peak.total / 2**30:.1f} GiB"
        )
    if where.json:
        write_json(Path(where.json), as_json(plan, floors, fits))


def parse(argv: list[str]) -> tuple[PlanArguments, Options]:
    """The planner's own options, and the run's.

    Raises:
        UserError: what cannot be read, or no model.
    """
    parser = Parser([PlanArguments], allow_abbrev=False, add_help="--config" not in argv)
    where, words = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    # A plan writes no results.
    options = parse_options([*words, "--output_dir", "."])
    where.model = where.model or options.model.model_name_or_path
    if not where.model:
        raise UserError("--model is missing: name one of the hub, a folder or a config.json")
    options.model.model_name_or_path = config_folder(where.model)
    return where, options


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    with exit_with_one_sentence():
        main(sys.argv[1:])
