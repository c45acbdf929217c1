"""Fine-tune a causal language model, on shards or on one device.

deepspeed --num_gpus 2 launch/train.py --ds_config ds_configs/zero3.json --config RECIPE.yaml
torchrun --nproc_per_node 2 launch/train.py --fsdp --config RECIPE.yaml
python launch/train.py --config RECIPE.yaml
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from datetime import timedelta

from scalora_dist.config import Options, parse_options
from scalora_dist.errors import exit_with_one_sentence


def plan(options: Options) -> None:
    from scalora_dist.planning.report import report, where_we_are

    if is_main:
        print(report(options, where_we_are()))


def train(options: Options) -> None:
    # The options are checked before the seconds that these imports take.
    from scalora_dist.engines.pick import pick_engine
    from scalora_dist.models import read_base
    from scalora_dist.summary import render
    from scalora_dist.trainer import Trainer
    from scalora_dist.world import World

    world = World.join(
        local_rank=options.launch.local_rank,
        timeout=timedelta(seconds=options.train.ddp_timeout),
    )
    options.train.settle_batch(world.size)
    base = read_base(options.model, options.train.dtype, world.device)
    make_engine = pick_engine(options, world, base)
    summary = Trainer(options, world, base, make_engine).run()
    if world.is_main:
        print(f"\n{render(summary)}")
    world.leave()


if __name__ == "__main__":
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s")
    # Renamed functions that DeepSpeed, or the oldest transformers we run with, has by the old name.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with exit_with_one_sentence():
        options = parse_options(sys.argv[1:])
        plan(options) if options.launch.dry_run else train(options)
