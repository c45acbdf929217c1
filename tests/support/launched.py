"""Starts runs by their command like a user, finds their ranks' processes and signals them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.support import runs
from tests.support.ranks import free_port

BIN = Path(sys.executable).parent
SCRIPT = "launch/train.py"
# On the PYTHONPATH of launched runs: hides PEFT and bitsandbytes, whose imports take seconds.
WITHOUT_PEFT = Path(__file__).parent / "without_peft"
# PYTHONPATH of launched runs: that, and the package of this checkout.
QUICK_START = f"{runs.REPOSITORY}:{WITHOUT_PEFT}"
# Of every process of a launched run, on CPU ranks with one thread each.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": QUICK_START,
    "TOKENIZERS_PARALLELISM": "false",
}

LAUNCHERS = {
    "local": [sys.executable],
    "fsdp": [str(BIN / "torchrun"), "--nproc_per_node", "2"],
    "zero3": [str(BIN / "deepspeed"), "--num_gpus", "2"],
}


class Launched:
    """A started command with all its processes. At the end of ``with``, all of them are killed."""

    def __init__(self, engine: str, case: dict[str, Any], log: Path) -> None:
        """
        Args:
            engine: a key of LAUNCHERS.
            case: the run's options.
            log: file for all that is printed.
        """
        port = str(free_port())
        launcher = LAUNCHERS[engine] + ["--master_port", port] * (engine != "local")
        command = [*launcher, SCRIPT, *runs.words(case)]
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=runs.REPOSITORY,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # The mark of this command's processes, so that no others are found.
                env=os.environ | ENVIRONMENT | {"SMALL_RUN": str(log)},
            )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(self.everyone())
        self.process.wait(60)

    def everyone(self) -> list[psutil.Process]:
        """All processes of the command, orphans too. The launcher comes first, if it is alive."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SMALL_RUN") == str(self.log):
                    found.append(process)
        return sorted(found, key=lambda process: process.pid != self.process.pid)

    def ranks(self) -> list[psutil.Process]:
        """The ranks' processes in rank order; the command's own process if there are none."""
        ranks = {}
        for process in self.everyone():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if SCRIPT in command and process.pid != self.process.pid:
                    rank = process.environ().get("RANK")
                    if rank is not None and Path(command[0]).name.startswith("python"):
                        ranks[int(rank)] = process
        return [ranks[rank] for rank in sorted(ranks)] or [psutil.Process(self.process.pid)]

    def launcher(self) -> psutil.Process:
        """The process that started the ranks: the command, or `deepspeed`'s process of this node.

        `deepspeed` itself dies of a SIGTERM without stopping the others, and the ranks train on.
        """
        return self.ranks()[0].parent()

    @staticmethod
    def kill(processes: list[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)

    def wait_for(self, condition: Callable[[], object], pause: float = 0.005) -> bool:
        """Wait until ``condition`` is true; False if the command ended before. At most 300 s.

        Args:
            pause: seconds between two checks.
        """
        deadline = time.monotonic() + 300
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.text()
            time.sleep(pause)
        return True

    def wait(self) -> int:
        return self.process.wait(300)

    def text(self) -> str:
        return self.log.read_text()


def last_step(folder: Path) -> int:
    """The last step that has a complete line in metrics.jsonl; 0 before the first."""
    try:
        text = (folder / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return 0
    whole = [json.loads(line) for line in text.split(b"\n")[:-1]]
    return max((line["step"] for line in whole if "loss" in line), default=0)
