"""``scalora plan``: plans a run on a cluster that need not be there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from transformers import logging as transformers_logging

from scalora_dist.config.parser import Parser, parse_options
from scalora_dist.planning.arguments import PlanArguments
from scalora_dist.planning.report import report

DESCRIPTION = """Plan a run on a cluster: memory by part, messages, least times, whether it fits.
The options of the run are those of `scalora train`, also from --config. No weights are loaded and
no GPU is needed: the model is built on the meta device, and one micro-batch is traced on tensors
without storage."""


def plan_command(words: Sequence[str]) -> str:
    """The text of a plan.

    Raises:
        UserError: a mistake in the options.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    parser = Parser(
        [PlanArguments],
        allow_abbrev=False,
        prog="scalora plan",
        description=DESCRIPTION,
        epilog="The run's options: scalora train --help.",
    )
    where, rest = parser.parse_args_into_dataclasses(list(words), return_remaining_strings=True)
    # A plan writes no results, so any folder will do.
    return report(parse_options([*rest, "--output_dir", "."]), where)
