"""Starts the command line's ``main`` on ranks that are forked with all imports done.

Like ``launched``, but a start takes a second, so that tests can kill many runs.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from scalora_dist.training.trainer import Trainer
from tests.support import runs
from tests.support.ranks import forkserver, free_port


class Forked:
    """The ranks of one run. At the end of ``with``, all of them are killed."""

    def __init__(
        self, size: int, case: dict[str, Any], log: Path, trainer: type[Trainer] = Trainer
    ) -> None:
        """
        Args:
            size: number of ranks.
            case: the run's options.
            log: file for all that is printed.
            trainer: what the command trains with.
        """
        context, port = forkserver(), free_port()
        self.log = log
        self.ranks: list[BaseProcess] = []
        for rank in range(size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            process = context.Process(
                target=_main, args=(environment, runs.words(case), log, trainer)
            )
            process.start()
            self.ranks.append(process)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL, range(len(self.ranks)))
        for process in self.ranks:
            process.join(60)

    def send(self, number: signal.Signals, whom: Sequence[int]) -> None:
        """Send a signal to some ranks, if they still run."""
        for rank in whom:
            if self.ranks[rank].exitcode is None:
                with suppress(ProcessLookupError):  # it ended meanwhile
                    os.kill(self.ranks[rank].pid or 0, number)

    def running(self) -> bool:
        return all(process.exitcode is None for process in self.ranks)

    def wait_for(self, condition: Callable[[], object]) -> bool:
        """Wait until ``condition`` is true; False if a rank ended before. At most 120 s."""
        deadline = time.monotonic() + 120
        while not condition():
            if not self.running():
                return False
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.001)  # the ranks need the cores
        return True

    def wait(self) -> list[int | None]:
        """The ranks' exit statuses. Like a launcher, end the others when one has failed."""
        deadline = time.monotonic() + 120
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # the others may be about to end by themselves
        if any(process.exitcode for process in self.ranks):
            self.send(signal.SIGTERM, range(len(self.ranks)))
        for process in self.ranks:
            process.join(10)
        return [process.exitcode for process in self.ranks]

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def _main(environment: dict[str, str], words: list[str], log: Path, trainer: type[Trainer]) -> None:
    os.environ |= environment
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from scalora_dist.cli import main
    from scalora_dist.training import trainer as module

    module.Trainer = trainer  # type: ignore[misc]
    main(["train", *words])
    os._exit(0)  # multiprocessing's own end waits for threads
