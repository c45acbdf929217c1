"""Times our LoRA and ScaLoRA steps beside PEFT's LoRA under DeepSpeed, in turn, in one process.

    torchrun --nproc_per_node 2 -m tools.bench_step --ds_config zero2 --config demo \\
        --model_name_or_path MODEL [--max_length 64 --rounds 5 --json out.json]

Takes the trainer's options and starts like the trainer. A round is one step of each kind, on the
same micro-batch of the data. So other load on the machine affects all of them alike, and shares are
taken within a round. PEFT's LoRA has the same model, rank, layers, DeepSpeed config and AdamW. It
gets what transformers' collators make of the same examples, and its loss is the model's own. A step
is timed as in tools/bench_rescale.py.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from scalora_dist.config.parser import parse_options
from scalora_dist.config.words import Parser
from scalora_dist.data.micro_batch import MicroBatch
from scalora_dist.data.prompts import IGNORE
from scalora_dist.engines.build import join
from scalora_dist.engines.ds_config import load_ds_config
from scalora_dist.errors import UserError, exit_with_one_sentence
from scalora_dist.profiling.versions import installed_versions
from scalora_dist.training.run_log import write_json
from scalora_dist.training.trainer import Trainer
from tools.bench_rescale import Bench, BenchArguments
from tools.gpu.peft_step import wrapped

SET_UP = 2  # ZeRO-3 learns the order of the weights in its first step, and uses it in its second
MOST = {"rescale / step": 0.04, "LoRA / PEFT": 0.9}  # what we want them to be at most


def peft_step(trainer: Trainer) -> Callable[[MicroBatch], None]:
    """A step of PEFT's LoRA under the trainer's DeepSpeed config, on a micro-batch with mask."""
    options, world = trainer.options, trainer.world
    if not options.launch.ds_config:
        raise UserError("PEFT's step is DeepSpeed's: name a --ds_config")
    if options.train.gradient_accumulation_steps > 1:
        raise UserError(
            "a step here is one micro-batch: leave out --train_batch_size and "
            "--gradient_accumulation_steps"
        )
    width = trainer.model.config.get_text_config().hidden_size
    config = load_ds_config(
        options.launch.ds_config, options.train, world_size=world.size, hidden_size=width
    )
    engine = wrapped(options, config, world)

    def step(batch: MicroBatch) -> None:
        loss = engine(**batch.inputs, labels=labels_of(batch), use_cache=False).loss
        engine.backward(loss)
        engine.step()

    return step


def labels_of(batch: MicroBatch) -> Tensor:
    """The labels of the batch as transformers' collators make them, (examples, longest) int64."""
    labels = torch.full_like(batch.input_ids, IGNORE)
    labels.view(-1)[batch.predicting + 1] = batch.targets
    return labels


def measure(trainer: Trainer, rounds: int) -> dict[str, Any]:
    """Time ``rounds`` rounds, after two in which the engines set themselves up. Collective."""
    bench, peft = Bench(trainer), peft_step(trainer)
    masked = trainer.feed.collate.masks
    trainer.feed.collate.masks = True  # PEFT's batches have a mask, as its users' have
    history = []
    for batch in islice(trainer.micro_batches(0), SET_UP + rounds):
        bench.batch = batch if masked else replace(batch, attention_mask=None)
        now = {"lora": bench.time(bench.lora_step), "peft": bench.time(partial(peft, batch))}
        now["scalora"] = bench.time(bench.scalora_step)
        (now["rescale"],) = bench.world.max(bench.seconds["rescale"])
        now["rescale / step"] = now["rescale"] / now["scalora"]
        now["LoRA / PEFT"] = now["lora"] / now["peft"]
        history.append(now)
    return {name: [now[name] for now in history[SET_UP:]] for name in history[0]}


def render(found: dict[str, list[float]]) -> str:
    lines = [f"{'':<16}{'median':>10}{'min':>10}{'max':>10}"]
    for name, values in found.items():
        unit, size = ("", 1.0) if name in MOST else (" ms", 1e3)
        shown = (f"{size * f(values):>10.4g}" for f in (median, min, max))
        line = f"{name + unit:<16}" + "".join(shown)
        lines.append(line + (f"   at most {MOST[name]} is wanted" if name in MOST else ""))
    return "\n".join([*lines, "PEFT's loss is its model's own, from full logits."])


def main(argv: list[str]) -> None:
    parser = Parser([BenchArguments], allow_abbrev=False, description=__doc__.partition("\n")[0])
    args, words = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--output_dir", folder, "--save_steps", "0", "--eval_size", "0"]
        options = parse_options([*words, *fixed])
        world = join(options)
        trainer = Trainer(options, world)
        found = measure(trainer, args.rounds)
        trainer.close()
    if world.is_main:
        print(render(found), flush=True)
        if args.json:
            versions = installed_versions("torch", "deepspeed", "transformers", "peft")
            write_json(Path(args.json), {"ranks": world.size, "versions": versions, **found})
    world.leave()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    with exit_with_one_sentence():
        main(sys.argv[1:])
