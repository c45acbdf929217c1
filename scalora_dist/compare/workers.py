"""Trains runs in processes of their own, some at a time, each with its own cores or GPUs."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import import_utils

from scalora_dist.compare.runs import Run
from scalora_dist.config.parser import parse_options
from scalora_dist.distributed.cores import cores
from scalora_dist.distributed.stop_signals import StopSignals
from scalora_dist.engines.build import join
from scalora_dist.errors import exit_with_one_sentence

# Modules that take seconds to import. The fork server imports them once, and each run is forked
# from it. It runs no operator, so it has no threads that a fork loses.
PRELOADED = (
    "scalora_dist.compare.workers",
    "scalora_dist.training.trainer",
    "scalora_dist.engines.local",
)
# DeepSpeed, which transformers imports too, chooses its device when it is imported.
PRELOADED_ON_CPUS = (*PRELOADED, "scalora_dist.engines.deepspeed")
# A process that was forked after CUDA was set up cannot use it. Libraries set it up when they are
# imported (bitsandbytes does), so the server sees no GPUs, and torch asks NVML for them.
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
# The environment of the only rank.
ALONE = {
    **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
}


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
        quantized: bool = False,
        context: ForkServerContext | None = None,
    ) -> None:
        """
        Args:
            count: number of runs at a time.
            ranks: ranks of each run. More than one: torchrun starts them.
            gpus: names of GPUs as in CUDA_VISIBLE_DEVICES, ``ranks`` for each place; empty: CPUs.
            quantized: whether a base is in 4 bits. On GPUs a run then has to import bitsandbytes
                itself: where it sees no GPU, it loads its code for CPUs.
            context: what starts the processes; by default a fork server of our own.
        """
        self.count = count
        self.ranks = ranks
        self.gpus = gpus
        self.forks = ranks == 1 and not (gpus and quantized)
        self.context = context or _fork_server(gpus=bool(gpus), forks=self.forks)
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
        threads = max(1, cores() // (self.count * self.ranks))
        environment = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.gpus:
            own = self.gpus[place * self.ranks : (place + 1) * self.ranks]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        train = _train if self.forks else _launch
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


def _fork_server(*, gpus: bool, forks: bool) -> ForkServerContext:
    """A server that has done the imports, if runs are forked from it."""
    context = mp.get_context("forkserver")
    if not forks:
        context.set_forkserver_preload([])
        return context
    context.set_forkserver_preload(list(PRELOADED if gpus else PRELOADED_ON_CPUS))
    before = {name: os.environ.get(name) for name in HIDDEN}
    os.environ |= HIDDEN
    forkserver.ensure_running()  # it keeps the environment that it is started in
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return context


def _train(words: list[str], environment: dict[str, str], log: Path, ranks: int) -> None:
    """Train in this process, as ``scalora train`` does. Ends the process."""
    # Here, and not above: the server has imported it, and the study itself does without.
    from scalora_dist.training.trainer import Trainer

    _settle(environment | ALONE, log)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # torch was imported before
    for found in vars(import_utils).values():
        if hasattr(found, "cache_clear"):  # what transformers has found where it saw no GPU
            found.cache_clear()
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


def _launch(words: list[str], environment: dict[str, str], log: Path, ranks: int) -> None:
    """Become ``scalora train``, or torchrun, which starts it on more ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    launcher = torchrun if ranks > 1 else []
    _settle(environment | ({} if ranks > 1 else ALONE), log)
    command = [sys.executable, *launcher, "-m", "scalora_dist", "train", *words]
    os.execv(sys.executable, command)


def _settle(environment: dict[str, str], log: Path) -> None:
    """Leave the terminal, whose Ctrl-C is for the study; set the environment; print to ``log``.

    Waits while processes of an earlier start of the run have the log open: they live on for a while
    when the study is killed. Without that two processes would train in one folder.
    """
    os.setsid()
    os.environ |= environment
    with open(log, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # held by all processes that print to it
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _stop_with_the_study() -> None:
    """Ask this run to stop when the study's process has died."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    with suppress(ProcessLookupError):
        os.kill(os.getpid(), signal.SIGTERM)
