"""Checks the folder that all nodes must share, in a folder of its own there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from scalora_dist.distributed.world import World
from scalora_dist.doctor.finding import Finding

MIB = 2**20
GIB = 2**30
BYTES = 64 * MIB
LEAST_FREE = 20 * GIB
CLEANED_SECONDS = 30.0  # for the deletion of the folder
NFS_SECONDS = 10.0  # time until a node surely sees a file that another node has made
# Reads until the other end of the pipe is closed, and then deletes its argument. NFS keeps a file
# for as long as a rank of the same node has it open.
CLEANER = 'read -r _; for _ in 1 2 3 4 5; do rm -rf -- "$1" && exit; sleep 1; done'


class SharedFolder:
    """A new folder where runs will write to. It is deleted when rank 0 ends, however it ends.

    Attributes:
        output_dir: what the user gave; it need not exist yet.
        parent: ``output_dir``, or where there is none, the first folder above it that exists.
        path: the new folder, as this rank calls it. ``check`` sets this and ``parent``.
    """

    parent: Path
    path: Path

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir.absolute()
        self._cleaner: subprocess.Popen[bytes] | None = None

    def check(self, world: World) -> Finding:
        """Make the folder. Whether every node sees it and writes to it, and how fast rank 0 does.

        Called on every rank.
        """
        above = (self.output_dir, *self.output_dir.parents)
        self.parent = next(path for path in above if path.is_dir())
        first = json.loads(world.exchange(self._make() if world.is_main else "")[0])
        where = f"{self.parent}: "
        if problem := first["problem"]:
            return Finding(where + problem, "give a folder that can be written to by --output_dir")
        self.path = self.parent / first["name"]
        leads = world.local_rank == 0
        problems = world.exchange(self._join(world.rank) if leads else "")
        if found := next(filter(None, problems), ""):
            return Finding(where + found, "give a folder that all nodes share by --output_dir")
        nodes = [
            f"rank-{rank}" for rank, each in enumerate(world.exchange(str(leads))) if each == "True"
        ]
        if world.is_main and not all(_appears(self.path / name) for name in nodes):
            return Finding(
                f"{where}rank 0 does not see what other nodes write there",
                "give a folder that all nodes share by --output_dir",
            )
        found = (
            f"{where}{first['rate'] / 1e6:.0f} MB/s from rank 0, {first['free'] / GIB:.0f} GiB free"
        )
        if world.nodes > 1:
            found += f", seen by all {world.nodes} nodes"
        if first["free"] < LEAST_FREE:
            advice = "free some space: a checkpoint of a 5B model takes some 20 GB"
            return Finding(found, advice, fatal=False)
        return Finding(found)

    @property
    def keepers(self) -> list[int]:
        """File descriptors. A process that inherits them keeps the folder until it ends."""
        return [self._cleaner.stdin.fileno()] if self._cleaner and self._cleaner.stdin else []

    def delete(self) -> None:
        """Delete the folder now, on rank 0."""
        if self._cleaner and self._cleaner.stdin:
            self._cleaner.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._cleaner.wait(CLEANED_SECONDS)

    def _make(self) -> str:
        """Make the folder and write to it. Returns what the other ranks must know, as JSON."""
        told = {"name": "", "problem": "", "rate": 0.0, "free": 0}
        try:
            self.path = Path(tempfile.mkdtemp(prefix=".scalora-doctor-", dir=self.parent))
            # A process of its own also deletes it when this one is killed.
            self._cleaner = subprocess.Popen(
                ["/bin/sh", "-c", CLEANER, "sh", str(self.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            told["name"] = self.path.name
            told["rate"] = _rate(self.path / "bytes")
            told["free"] = shutil.disk_usage(self.path).free
        except OSError as error:
            told["problem"] = f"rank 0 cannot write there ({error.strerror or error})"
        return json.dumps(told)

    def _join(self, rank: int) -> str:
        """Look for the folder, and leave a file in it. Returns what went wrong, or nothing."""
        who = f"rank {rank} ({socket.gethostname()})"
        if not _appears(self.path):
            return f"{who} does not see what rank 0 writes to its --output_dir"
        try:
            (self.path / f"rank-{rank}").touch()
        except OSError as error:
            return f"{who} cannot write there ({error.strerror or error})"
        return ""


def _rate(path: Path) -> float:
    """Write, sync and delete a file; bytes/s."""
    begun = time.perf_counter()
    with open(path, "wb") as file:
        file.write(os.urandom(MIB) * (BYTES // MIB))
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    path.unlink()
    return BYTES / seconds


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + NFS_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return path.exists()
