"""PEFT's LoRA under DeepSpeed as its users write it: the steps of `tools/gpu/step.py`, without us.

The same model, shapes, optimizer and DeepSpeed config. The loss is the model's own, from full
logits.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from scalora_dist.config.options import Options
from scalora_dist.distributed.world import World
from scalora_dist.engines.build import join
from scalora_dist.engines.ds_config import load_ds_config
from scalora_dist.layers.target_modules import ALL_LINEAR
from scalora_dist.modeling.load import read_base_model
from scalora_dist.training.resolve import resolve
from scalora_dist.training.run_log import write_json
from tools.gpu.step import WARM_UP, options_of, step_parser, time_steps


def wrapped(options: Options, config: dict[str, Any], world: World) -> Any:
    """The model with PEFT's adapters, as DeepSpeed's engine."""
    keep = None
    on_device: dict[str, Any] = {"device_map": {"": world.device}}
    if config["zero_optimization"]["stage"] == 3:
        keep, on_device = HfDeepSpeedConfig(config), {}  # from_pretrained shards while it lives
    model = AutoModelForCausalLM.from_pretrained(
        options.model.model_name_or_path,
        dtype=options.train.dtype,
        attn_implementation=options.model.attn_implementation,
        **options.model.source,
        **on_device,
    )
    del keep
    if options.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    method = options.method
    targets = list(method.target_modules)
    lora = LoraConfig(
        r=method.rank,
        lora_alpha=int(method.lora_alpha),
        lora_dropout=method.lora_dropout,
        target_modules=targets if targets != [ALL_LINEAR] else ALL_LINEAR,
    )
    model = get_peft_model(model, lora)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.train.learning_rate)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, optimizer=optimizer, config=config
    )
    return engine


def measure(options: Options, steps: int, world: World) -> dict[str, Any]:
    """Take the steps on random tokens and return their figures. Collective."""
    device, train = world.device, options.train
    base = read_base_model(options.model, train.dtype, device)
    options = resolve(options, world.size, base)
    assert options.launch.ds_config
    config = load_ds_config(
        options.launch.ds_config, options.train, world_size=world.size, hidden_size=base.hidden_size
    )
    engine = wrapped(options, config, world)
    shape = (train.per_device_train_batch_size, options.data.max_length)
    vocabulary = engine.module.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(world.rank)
    accumulation = options.train.gradient_accumulation_steps

    def take(_: int) -> None:
        for _ in range(accumulation):
            ids = torch.randint(vocabulary, shape, generator=generator).to(device)
            mask = torch.ones_like(ids)
            loss = engine(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
            engine.backward(loss)
            engine.step()

    timed = time_steps(world, WARM_UP + steps, take)
    return {**timed, "tokens": shape[0] * shape[1] * accumulation * world.size}


def main() -> None:
    args: argparse.Namespace = step_parser(__doc__).parse_args()
    options = options_of("lora", args.folder, Path("unused"), args)
    world = join(options)
    found = measure(options, args.steps, world)
    if world.is_main:
        write_json(args.json, {**found, "ranks": world.size})
    world.leave()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
