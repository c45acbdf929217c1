"""The command line: plan a run, or train.

Signals count from the first moment, before the seconds that the imports take. The options are read
and checked before torch's distributed parts and DeepSpeed are imported.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from scalora_dist.distributed.stop_signals import StopSignals
from scalora_dist.errors import exit_with_one_sentence, is_rank_0

if TYPE_CHECKING:
    from scalora_dist.config.options import Options


def main(argv: Sequence[str] | None = None) -> None:
    """What every rank of a launched run calls. Mistakes end it with one sentence and status 2.

    Args:
        argv: the options; by default those of the process.
    """
    level = logging.INFO if is_rank_0() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    # Renamed functions that DeepSpeed, or the oldest transformers we run with, has by the old name.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with StopSignals() as signals, exit_with_one_sentence(signals.ignore):
        from scalora_dist.config.parser import parse_options

        options = parse_options(sys.argv[1:] if argv is None else argv)
        if options.launch.dry_run:
            plan(options)
        else:
            signals.output_dir = Path(str(options.train.output_dir))
            train(options, signals)
        signals.outlast()


def plan(options: Options) -> None:
    """Print what the run will need on the ranks that it was launched on."""
    from scalora_dist.planning.report import report, where_we_are

    if is_rank_0():
        print(report(options, where_we_are()))


def train(options: Options, signals: StopSignals) -> None:
    """Train, and print the summary.

    Args:
        signals: what handles requests to stop; already entered.
    """
    from scalora_dist.distributed.world import World
    from scalora_dist.engines.build import engine_factory
    from scalora_dist.modeling.load import read_base_model
    from scalora_dist.training.summary import render
    from scalora_dist.training.trainer import Trainer

    world = World.join(
        local_rank=options.launch.local_rank,
        timeout=timedelta(seconds=options.train.ddp_timeout),
    )
    signals.share(world)
    options.train.settle_batch(world.size)
    base = read_base_model(options.model, options.train.dtype, world.device)
    make_engine = engine_factory(options, world, base)
    summary = Trainer(options, world, base, make_engine, signals).run()
    if world.is_main:
        print(f"\n{render(summary)}")
    world.leave()
