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
    left = [int(psutil.virtual_memory().available)]
    left += [_left(folder, "max", "current") for folder in cores.own_cgroups()]
    left += [_left(folder, "limit_in_bytes", "usage_in_bytes") for folder in _version_1()]
    return max(0, min(left))


def _version_1() -> list[Path]:
    """Folders of this process's memory cgroup (version 1) and of all above it."""
    with suppress(OSError, StopIteration):
        lines = (line.split(":", 2) for line in cores.OWN_GROUP.read_text().splitlines())
        group = Path(next(path for _, kinds, path in lines if "memory" in kinds.split(",")))
        return [
            cores.CGROUPS / "memory" / folder.relative_to("/") for folder in (group, *group.parents)
        ]
    return []


def _left(folder: Path, limit: str, used: str) -> int:
    """Bytes left of a cgroup's limit; very many if it has none.

    Args:
        limit: end of the name of the file with the limit.
        used: end of the name of the file with what is used.
    """
    with suppress(OSError, ValueError):  # no such file, or "max": no limit
        most, now = (int((folder / f"memory.{name}").read_text()) for name in (limit, used))
        return most - now + _file_cache(folder)
    return sys.maxsize


def _file_cache(folder: Path) -> int:
    """Bytes of files that the kernel drops when a cgroup needs memory. They count as used."""
    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(counts.get("inactive_file", counts.get("total_inactive_file", 0)))
