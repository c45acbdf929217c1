"""The memory of the host that this process may still use."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import psutil

from scalora_dist.distributed import cores


def available_bytes() -> int:
    """Bytes that this process may still use: what the machine has, within its container's limit.

    A container with a limit on its memory (Docker's ``--memory``, Kubernetes' ``limits.memory``)
    sees all memory of its machine. A process that goes beyond the limit is killed.
    """
    available = min(int(psutil.virtual_memory().available), _left_of_version_1())
    for folder in cores.own_cgroups():
        with suppress(OSError, ValueError):  # no such file, or "max": no limit
            limit, used = (int((folder / f"memory.{x}").read_text()) for x in ("max", "current"))
            available = min(available, limit - used + _file_cache(folder))
    return max(0, available)


def _left_of_version_1() -> int:
    """Bytes left of the limits of this process's memory cgroup (version 1), and of those above."""
    left = sys.maxsize
    with suppress(OSError, StopIteration):
        lines = (line.split(":", 2) for line in cores.OWN_GROUP.read_text().splitlines())
        group = Path(next(path for _, kinds, path in lines if "memory" in kinds.split(",")))
        for folder in (group, *group.parents):
            here = cores.CGROUPS / "memory" / folder.relative_to("/")
            with suppress(OSError, ValueError):
                limit, used = (
                    int((here / f"memory.{x}_in_bytes").read_text()) for x in ("limit", "usage")
                )
                left = min(left, limit - used + _file_cache(here))
    return left


def _file_cache(folder: Path) -> int:
    """Bytes of files that the kernel drops when a cgroup needs memory. They count as used."""
    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(counts.get("inactive_file", counts.get("total_inactive_file", 0)))
