"""Trains a tiny model under ZeRO-3 and FSDP2, and compares the losses with one process's."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scalora_dist.config.parser import parse_options
from scalora_dist.distributed.world import World
from scalora_dist.doctor.disk import SharedFolder
from scalora_dist.doctor.finding import Finding
from scalora_dist.errors import UserError

STEPS = 3
# Relative, of a loss or a gradient norm. fp32 on CPU ranks agrees to 1e-6; a run that does not
# update its weights is off by 5e-3 in step 2.
TOLERANCE = 1e-3
ENGINES = {"ZeRO-3": ["--ds_config", "zero3"], "FSDP2": ["--fsdp"]}


class TinyRuns:
    """Runs of ScaLoRA on a random Llama, with a rescale and a merge in each step.

    Attributes:
        world: the ranks.
        folder: where the model, the data and what the runs leave are.
        seconds: time for the run in one process, imports included.
        reference: the losses and gradient norms of one process; on rank 0.
    """

    def __init__(self, world: World, folder: SharedFolder, seconds: float = 150) -> None:
        self.world = world
        self.folder = folder
        self.seconds = seconds
        self.reference: list[float] = []

    def alone(self) -> Finding:
        """Train in a process of its own, on rank 0's device. Called on every rank.

        Raises:
            UserError: it failed.
        """
        begun = time.monotonic()
        self.world.main_only(self._alone)
        shown = ", ".join(f"{loss:.4f}" for loss in self.reference[::2])
        return Finding(f"losses {shown} ({time.monotonic() - begun:.0f} s with its imports)")

    def _alone(self) -> None:
        save_model(self.folder.path)
        output = self.folder.path / "alone"
        launchers = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "TORCHELASTIC_", "GROUP_", "ROLE_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(launchers)}
        environment["HF_DATASETS_CACHE"] = str(self._cache)
        command = [sys.executable, "-m", "scalora_dist", "train"]
        command += options(self.folder.path, output, self.world.size)
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=self.seconds,
                pass_fds=self.folder.keepers,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"scalora train in one process has not ended in {self.seconds:.0f} s; the machine "
                "is busy or slow: free it, or set a larger --hang_timeout"
            ) from error
        if done.returncode:
            last = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
            raise UserError(f"scalora train in one process: {last}")
        self.reference = losses_and_norms(output)

    @property
    def _cache(self) -> Path:
        return self.folder.path / "caches"

    def check(self, engine: str) -> Finding:
        """Train on all ranks, and compare with one process. Called on every rank.

        Args:
            engine: a key of ``ENGINES``.
        """
        begun = time.monotonic()
        output = self.folder.path / engine
        words = [*options(self.folder.path, output, self.world.size), *ENGINES[engine]]
        with quiet(), caches_in(self._cache):
            from scalora_dist.training.trainer import Trainer

            trainer = Trainer(parse_options(words), self.world)
            try:
                trainer.run()
            except Exception:
                trainer.watchdog.close()
                raise
        if not self.world.is_main:
            return Finding("")
        pairs = list(zip(losses_and_norms(output), self.reference, strict=True))
        off = max(abs(mine - alone) / alone for mine, alone in pairs)
        found = f"{STEPS} steps, losses and gradient norms within {off:.0e} of one process's"
        if all(math.isclose(mine, alone, rel_tol=TOLERANCE) for mine, alone in pairs):
            return Finding(f"{found} ({time.monotonic() - begun:.0f} s)")
        return Finding(
            found,
            "this engine trains to other numbers: compare the versions with constraints.txt, and "
            "report it with this table",
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what libraries log, warn of and draw. The watchdog's sentence is written past this."""
    logging.disable(logging.WARNING)
    nowhere = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def caches_in(folder: Path) -> Iterator[None]:
    """Let datasets, and what this package keeps with it, cache in ``folder``."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


def losses_and_norms(output: Path) -> list[float]:
    """The loss and the gradient norm of each step."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if "loss" in line for name in ("loss", "grad_norm")]


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
        "learning_rate": 1e-2,
        "max_grad_norm": 0.1,
        "save_steps": 0,
        "save_model": False,
        "update_rank_layers": 0,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def save_model(folder: Path) -> None:
    """A random Llama of two layers, a tokenizer of bytes, and texts."""
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "model")
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
    torch.manual_seed(0)
    with quiet():
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    rows = [{"text": f"{i} times {i + 1} is {i * (i + 1)}"} for i in range(64)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
