"""Runs a model of some kilobytes on ranks that already run, and reads what a run leaves."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from scalora_dist.checkpoint.manifest import checkpoints, is_sound, step_of
from scalora_dist.config.parser import parse_options
from scalora_dist.data.collate import Collator, PaddedExamples
from scalora_dist.data.prepare import prepare_data
from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError
from scalora_dist.modeling.load import load_tokenizer
from scalora_dist.modeling.loss import target_losses
from scalora_dist.training.trainer import Trainer
from tests.support import runs

# Dropout draws random numbers, and the examples of three epochs are shuffled three times. A step of
# two ranks has two micro-batches; each micro-batch costs a run as much as dozens of examples.
TASK: dict[str, Any] = {
    "max_length": 24,
    "eval_size": 5,
    "rank": 4,
    "lora_alpha": 8,
    "learning_rate": 1e-3,
    "train_batch_size": 12,
    "per_device_train_batch_size": 3,
    "lora_dropout": 0.1,
    "save_model": False,
    "update_rank_layers": 0,
}
TIMINGS = ("seconds", "seconds_per_step", "method_share", "tokens_per_second", "peak_memory_bytes")
# Methods that differ from others in s, in a learning rate, or in whose layers they are: they need
# not be tried everywhere.
LIKE_OTHERS = ("rslora", "lora-alpha", "lora-plus", "peft-lora")
# (engine that shards weights, number of ranks)
CUT_UP = [
    ("zero3", 2),
    ("fsdp", 2),
    pytest.param("zero3", 4, marks=pytest.mark.heavy),
    pytest.param("fsdp", 4, marks=pytest.mark.heavy),
]


def options(task: Path, output_dir: Path, engine: str, **others: Any) -> dict[str, Any]:
    """Options of a run on an engine of ``runs.engine_options``; None removes a default."""
    given = {"model_name_or_path": task, "dataset": task / "texts.jsonl", "output_dir": output_dir}
    given |= TASK | runs.engine_options(engine, output_dir.parent) | others
    return {name: value for name, value in given.items() if value is not None}


def timeless(value: Any) -> Any:
    """``value`` without timings and memory, in which two runs always differ."""
    if isinstance(value, list):
        return [timeless(item) for item in value]
    if isinstance(value, dict):
        return {name: timeless(item) for name, item in value.items() if name not in TIMINGS}
    return value


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without timings."""
    return timeless(runs.metrics(folder))


def digests(folder: Path) -> dict[str, str]:
    """Checksums of the merged model, {safetensors file: SHA-256}."""
    files = folder.glob("model/*.safetensors")
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert found
    return found


def left(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, str]]:
    """The results that must not depend on an interruption: metrics, summary and checksums."""
    summary = json.loads((folder / "summary.json").read_text())
    return lines(folder), timeless(summary), digests(folder)


def sound(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, the newest first; all must be whole."""
    assert all(is_sound(checkpoint) for checkpoint in checkpoints(folder))
    return [step_of(checkpoint) or 0 for checkpoint in checkpoints(folder)]


def steady(task: Path, folder: Path, engine: str, **others: Any) -> dict[str, Any]:
    """No dropout, which other ranks draw otherwise."""
    return options(
        task,
        folder,
        engine,
        **{"max_steps": 8, "save_steps": 4, "eval_steps": 4, "lora_dropout": 0.0, **others},
    )


def evaluations(folder: Path) -> list[float]:
    return [line["eval_loss"] for line in lines(folder) if "eval_loss" in line]


def loss_on_held_out(case: dict[str, Any], model: Path) -> float:
    """The mean loss over the evaluation set by transformers alone, one example at a time."""
    parsed = parse_options(runs.words(case))
    tokenizer = load_tokenizer(parsed.model)
    data = prepare_data(parsed.data, tokenizer, parsed.train.seed).evaluation
    assert data is not None and len(data) == TASK["eval_size"]
    examples, collate = PaddedExamples(data), Collator(tokenizer, len(tokenizer))
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total, targets = 0.0, 0
    with torch.no_grad():
        for i in range(len(data)):
            batch = collate([examples[i]])
            total += float(target_losses(loaded(**batch.inputs).logits, batch).loss)
            targets += data[i]["target_tokens"]
    return total / targets


# Functions for ranks that already run.


@contextlib.contextmanager
def warnings_of(logger_name: str = "scalora_dist") -> Iterator[list[str]]:
    """Collects the warnings that are logged inside ``with``. Ranks' processes have no other log."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear, logger = Ear(logging.WARNING), logging.getLogger(logger_name)
    logger.addHandler(ear)
    try:
        yield heard
    finally:
        logger.removeHandler(ear)


def train(
    world: World, case: dict[str, Any], trainer: type[Trainer] = Trainer
) -> tuple[int, dict[str, Any], list[str]]:
    """Train. Returns (first step of this run, summary without timings, warnings)."""
    with warnings_of() as heard:
        made = runs.make(world, case, trainer)
        summary = made.run()
    return made.progress.first_step, timeless(summary), heard


def fp16_options(engine: str, folder: Path, **settings: Any) -> dict[str, Any]:
    """Options for fp16 under a ZeRO stage. Writes the DeepSpeed config to ``folder``.

    Args:
        settings: values for the config's fp16 section.
    """
    config = json.loads(Path(runs.ds_config(engine)).read_text())
    config["fp16"] = {"enabled": "auto", **settings}
    (folder / "ds.json").write_text(json.dumps(config))
    return {"ds_config": folder / "ds.json", "fp16": True}


def train_fp16(world: World, case: dict[str, Any]) -> tuple[int, dict[str, Any], list[str]]:
    """Like ``train``, with DeepSpeed's check for fp16 disabled: CPUs have fp16, but it is slow."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    had, accelerator.is_fp16_supported = accelerator.is_fp16_supported, lambda: True
    try:
        return train(world, case)
    finally:
        accelerator.is_fp16_supported = had


def refusal(
    world: World, case: dict[str, Any], trainer: type[Trainer] = Trainer
) -> tuple[str, int, list[str]]:
    """Run until a UserError. Returns (its message, its exit status, the warnings before it)."""
    with warnings_of() as heard:
        try:
            runs.make(world, case, trainer).run()
        except UserError as error:
            return str(error), error.status, heard
    raise AssertionError("nothing was refused")
