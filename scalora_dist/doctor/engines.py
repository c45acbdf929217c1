"""Trains a tiny model under ZeRO-3 and FSDP2, and compares the losses with one process's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scalora_dist.config.parser import parse_options
from scalora_dist.distributed.world import World
from scalora_dist.doctor.finding import Finding
from scalora_dist.errors import RunExit

STEPS = 3
TOLERANCE = 1e-3  # of a loss, relative; fp32 on one kind of device agrees to 1e-5
SECONDS = 300  # for the one process, imports included
ENGINES = {"ZeRO-3": ["--ds_config", "zero3"], "FSDP2": ["--fsdp"]}


def check_engines(world: World, folder: Path) -> list[Finding]:
    """ScaLoRA on a random Llama, with a rescale and a merge in each step. A collective.

    Args:
        folder: shared by all nodes; a folder in it is made, and deleted in the end.
    """
    mine = folder / ".doctor-run"
    try:
        world.main_only(lambda: save_model(mine))
        alone: list[float] = world.main_only(lambda: train_alone(world, mine)) or []
        return [_check(world, name, mine, alone) for name in ENGINES]
    finally:
        if world.is_main:
            shutil.rmtree(mine, ignore_errors=True)


def _check(world: World, name: str, folder: Path, alone: list[float]) -> Finding:
    from scalora_dist.training.trainer import Trainer

    output = folder / name
    words = [*options(folder, output, world.size), *ENGINES[name]]
    try:
        Trainer(parse_options(words), world).run()
    except (RunExit, RuntimeError) as error:
        return Finding(name, str(error).partition("\n")[0], "this engine cannot train here")
    off = 0.0
    if world.is_main:
        found = losses(output)
        off = max(abs(x - y) / y for x, y in zip(found, alone, strict=True))
    (off,) = world.max(off)
    text = f"{STEPS} steps, losses within {off:.0e} of one process"
    if off <= TOLERANCE:
        return Finding(name, text)
    return Finding(
        name,
        text,
        "this engine trains to other numbers: compare torch's and DeepSpeed's versions with "
        "constraints.txt, and report it with this table",
    )


def train_alone(world: World, folder: Path) -> list[float]:
    """The losses of the same run in a process of its own, on this rank's device.

    Raises:
        UserError: it failed.
    """
    launchers = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "TORCHELASTIC_", "GROUP_", "ROLE_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(launchers)}
    if world.device.type == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = str(torch.cuda.get_device_properties(0).uuid)
    output = folder / "alone"
    command = [sys.executable, "-m", "scalora_dist", "train"]
    command += options(folder, output, world.size)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"one process cannot train: {done.stderr.strip().splitlines()[-1]}")
    return losses(output)


def losses(output: Path) -> list[float]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def options(folder: Path, output: Path, ranks: int) -> list[str]:
    """The words of a run whose global batch is two examples per rank."""
    given = {
        "model_name_or_path": folder / "model",
        "dataset": folder / "texts.jsonl",
        "output_dir": output,
        "train_batch_size": 2 * ranks,
        "max_steps": STEPS,
        "max_length": 32,
        "rank": 4,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.1,
        "save_steps": 0,
        "save_model": False,
        "update_rank_layers": 0,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def save_model(folder: Path) -> None:
    """A random Llama of two layers, a tokenizer of bytes, and texts."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "model").mkdir(parents=True)
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rows = [{"text": f"{i} times {i + 1} is {i * (i + 1)}"} for i in range(64)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
