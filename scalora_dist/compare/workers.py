"""Trains runs in processes of their own, some at a time, each with its own cores or GPUs."""

from __future__ import annotations

import logging
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

from scalora_dist.compare.runs import Run
from scalora_dist.config.parser import parse_options
from scalora_dist.distributed.stop_signals import StopSignals
from scalora_dist.engines.build import join
from scalora_dist.errors import exit_with_one_sentence
from scalora_dist.training.trainer import Trainer

# Modules that take seconds to import. The fork server imports them once, each run is forked from
# it. It runs no operator and asks for no GPU: a forked process could not use CUDA then.
PRELOADED = (
    "scalora_dist.compare.workers",
    "scalora_dist.engines.local",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)


@dataclass
class Process:
    """A run that is being trained.

    Attributes:
        run: the run.
        place: number of the worker.
        started: `time.monotonic` of its start, seconds.
        process: its process.
    """

    run: Run
    place: int
    started: float
    process: BaseProcess


class Workers:
    """``count`` places, each for one run at a time.

    Attributes:
        running: the processes.
    """

    def __init__(
        self,
        count: int,
        *,
        ranks: int,
        gpus: list[str],
        context: ForkServerContext | None = None,
    ) -> None:
        """
        Args:
            count: number of runs at a time.
            ranks: ranks of each run. More than one: torchrun starts them.
            gpus: names of GPUs as in CUDA_VISIBLE_DEVICES, ``ranks`` for each place; empty: CPUs.
            context: what starts the processes; by default a fork server of our own.
        """
        if context is None:
            # `torch.cuda.is_available` then asks NVML, and does not set CUDA up.
            os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
            context = mp.get_context("forkserver")
            context.set_forkserver_preload(list(PRELOADED) if ranks == 1 else [])
        self.context = context
        self.count = count
        self.ranks = ranks
        self.gpus = gpus
        self.running: list[Process] = []

    @property
    def free(self) -> bool:
        return len(self.running) < self.count

    def start(self, run: Run, words: list[str], log: Path) -> None:
        """Start a run in a free place.

        Args:
            words: the options of ``scalora train``.
            log: a file that all that is printed is added to.
        """
        place = min(set(range(self.count)) - {each.place for each in self.running})
        threads = max(1, len(os.sched_getaffinity(0)) // (self.count * self.ranks))
        environment = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.gpus:
            own = self.gpus[place * self.ranks : (place + 1) * self.ranks]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        train = _train if self.ranks == 1 else _torchrun
        process = self.context.Process(
            target=train, args=(words, environment, log, self.ranks), daemon=True
        )
        process.start()
        self.running.append(Process(run, place, time.monotonic(), process))

    def ended(self, timeout: float) -> list[tuple[Run, int, float]]:
        """Wait until a run has ended, at most ``timeout`` seconds.

        Returns:
            (run, exit status, seconds) of those that have.
        """
        wait([each.process.sentinel for each in self.running], timeout)
        over = [each for each in self.running if each.process.exitcode is not None]
        self.running = [each for each in self.running if each not in over]
        now = time.monotonic()
        return [(each.run, each.process.exitcode or 0, now - each.started) for each in over]

    def stop(self) -> None:
        """Ask all runs to stop, and wait until they have."""
        for each in self.running:
            each.process.terminate()
        for each in self.running:
            each.process.join()
        self.running = []


def _train(words: list[str], environment: dict[str, str], log: Path, ranks: int) -> None:
    """Train in this process, as ``scalora train`` does. Ends the process."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    _settle(environment | alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}, log)
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # torch is imported already
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which os._exit would leak
    threading.Thread(target=_stop_with_the_study, daemon=True).start()
    with StopSignals() as signals, exit_with_one_sentence(signals.ignore):
        options = parse_options(words)
        Trainer(options, join(options), signals).run()
        signals.outlast()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # multiprocessing's own end waits for threads


def _torchrun(words: list[str], environment: dict[str, str], log: Path, ranks: int) -> None:
    """Become torchrun, which starts the ranks."""
    _settle(environment, log)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *launcher, "-m", "scalora_dist", "train", *words]
    os.execv(sys.executable, command)


def _settle(environment: dict[str, str], log: Path) -> None:
    """Leave the terminal, whose Ctrl-C is for the study; set the environment; print to ``log``."""
    os.setsid()
    os.environ |= environment
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _stop_with_the_study() -> None:
    """Ask this run to stop when the study's process has died."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    with suppress(ProcessLookupError):
        os.kill(os.getpid(), signal.SIGTERM)
