"""Checks the folder that all nodes must share."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path

from scalora_dist.distributed.world import World
from scalora_dist.doctor.finding import Finding

MIB = 2**20
BYTES = 64 * MIB
LEAST_FREE = 20 * 2**30
NFS_SECONDS = 10.0  # time until a node surely sees a file that another node has made


def check_disk(world: World, folder: Path) -> Finding:
    """Whether every node sees what rank 0 writes to ``folder``, and how fast. A collective."""
    probe: Path | None = None
    problem, rate, free = "", 0.0, 0
    token = uuid.uuid4().hex
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".doctor-{token}"
            rate = _write(probe)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            problem = f"{error.strerror or error}"
        world.store.set("doctor/probe", f"{'' if problem else token}")
    token = world.store.get("doctor/probe").decode()
    seen = bool(token) and _appears(folder / f".doctor-{token}")
    (missing,) = world.sum(world.local_rank == 0 and not seen)
    if probe:
        probe.unlink(missing_ok=True)
    name, where = "shared folder", str(folder.absolute())
    rate, free = world.max(rate, float(free))
    if not token:
        return Finding(name, where, f"rank 0 cannot write there ({problem}): give --output_dir")
    found = f"{where}: {rate / 1e6:.0f} MB/s, {free / 2**30:.0f} GiB free"
    if missing:
        return Finding(
            name,
            found,
            f"{missing:.0f} of {world.nodes} nodes do not see it: give a folder on a disk that all "
            "nodes share with --output_dir",
        )
    if free < LEAST_FREE:
        return Finding(
            name, found, "little is free: a checkpoint of 12B takes some 50 GB", fatal=False
        )
    return Finding(name, found)


def _write(path: Path) -> float:
    """Write and sync a file; bytes/s."""
    begun = time.perf_counter()
    with open(path, "wb") as file:
        file.write(os.urandom(MIB) * (BYTES // MIB))
        file.flush()
        os.fsync(file.fileno())
    return BYTES / (time.perf_counter() - begun)


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + NFS_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return path.exists()
