"""Fine-tune a causal language model on shards.

    deepspeed --num_gpus 2 launch/train.py --ds_config ds_configs/zero3.json \\
        --config launch/recipes/demo.yaml [--field value …]
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from datetime import timedelta

from scalora_dist.config import Options, parse_options
from scalora_dist.errors import UserError, exit_on_user_error


def train(options: Options) -> None:
    if not options.launch.ds_config:
        raise UserError("--ds_config is missing: name a DeepSpeed JSON, e.g. ds_configs/zero3.json")
    # The options are checked before the seconds that these imports take.
    from scalora_dist.engines.deepspeed import DeepSpeedEngine
    from scalora_dist.engines.ds_config import load_ds_config
    from scalora_dist.summary import render
    from scalora_dist.trainer import Trainer, hidden_size
    from scalora_dist.world import World

    world = World.join(
        local_rank=options.launch.local_rank,
        timeout=timedelta(seconds=options.train.ddp_timeout),
    )
    config = load_ds_config(
        options.launch.ds_config,
        options.train,
        world_size=world.size,
        hidden_size=hidden_size(options.model),
    )
    summary = Trainer(options, world, lambda: DeepSpeedEngine(world, config)).run()
    if world.is_main:
        print(f"\n{render(summary)}")
    world.leave()


if __name__ == "__main__":
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s")
    # Renamed functions that DeepSpeed, or the oldest transformers we run with, has by the old name.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with exit_on_user_error():
        train(parse_options(sys.argv[1:]))
