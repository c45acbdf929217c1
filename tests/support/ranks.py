"""Real ranks for tests: processes that start once, join a gloo group, and then run functions."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext, ForkServerContext
from typing import Any

import torch
from torch.distributed import distributed_c10d as c10d

# With `pytest --gpus N`: N. Each rank then has a GPU of its own; without one, the CPU.
GPUS: int | None = None


def most_ranks(wanted: int) -> int:
    """``wanted`` ranks, or fewer where the ranks run on GPUs and there are not that many."""
    return min(wanted, GPUS or wanted)


def on_gpus() -> bool:
    """Whether the ranks run on GPUs."""
    return bool(GPUS) and torch.cuda.is_available()


def forkserver() -> ForkServerContext:
    """A context that starts processes in milliseconds, with all imports of a rank already done."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preloaded"])
    return context


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ranks:
    """``size`` processes. ``run`` calls a function on all of them; its first argument is World.

    Attributes:
        failed: whether a function has failed on a rank. On a GPU all later work may then fail.
    """

    failed = False

    def __init__(self, size: int) -> None:
        # A forked process cannot use CUDA if its parent has touched it, as imports may do.
        context: BaseContext = mp.get_context("spawn") if on_gpus() else forkserver()
        port = free_port()
        self.size = size
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(  # type: ignore[attr-defined]
                target=_serve, args=(theirs, rank, size, port), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = 300, **kwargs: Any
    ) -> list[Any]:
        """Call a function on all ranks. Returns its results in rank order.

        Args:
            timeout: seconds to wait for each rank's answer.

        Raises:
            RuntimeError: the function failed; with the traceback of the first rank that failed.
            TimeoutError: a rank gave no answer in time.
        """
        self.failed = True  # unless all ranks answer
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout):
                raise TimeoutError(f"rank {rank} of {self.size} gave no answer in {timeout} s")
            answers.append(pipe.recv())
        for rank, (fine, answer) in enumerate(answers):
            if not fine:
                raise RuntimeError(f"rank {rank} of {self.size}:\n{answer}")
        self.failed = False
        return [answer for _, answer in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()


def _leave_groups() -> None:
    """Leave what groups checkpoints have open: their threads wake 100 times a second."""
    for group in list(c10d._world.pg_map):
        if group.group_desc == "checkpoints":
            c10d.destroy_process_group(group)


def _serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # By default cuBLAS takes 32 MiB and more on a GPU, which tests of memory would see.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    from scalora_dist.distributed.world import World

    world = World.join(timeout=timedelta(seconds=120))
    first = True
    while True:
        function, args, kwargs = pipe.recv()
        try:
            pipe.send((True, function(world, *args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        _leave_groups()
        if first:  # objects loaded by now stay: exclude them from later garbage collections
            gc.collect()
            gc.freeze()
            first = False
