"""Plans a run on a cluster: memory by part, messages, least times, and whether it fits.

    python tools/plan.py --model google/gemma-3-12b-pt --nodes 2 --gpus_per_node 8 --gpu h100-80g \\
        --ds_config ds_configs/zero3_12b.json --method scalora --rank 8 --bf16 \\
        --per_device_train_batch_size 4 --max_length 1024

The options of the run are the trainer's own (also from `--config RECIPE.yaml`). No weights are
loaded and no GPU is needed. The model is built on the meta device, and one micro-batch is traced on
tensors without storage.
"""

from __future__ import annotations

import sys
import warnings

from transformers import logging as transformers_logging

from scalora_dist.config.parser import Parser, parse_options
from scalora_dist.errors import exit_with_one_sentence
from scalora_dist.planning.arguments import PlanArguments
from scalora_dist.planning.report import report


def main(argv: list[str]) -> None:
    parser = Parser([PlanArguments], allow_abbrev=False, description=__doc__)
    where, words = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    # A plan writes no results, so any folder will do.
    print(report(parse_options([*words, "--output_dir", "."]), where))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    with exit_with_one_sentence():
        main(sys.argv[1:])
