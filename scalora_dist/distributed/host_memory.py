"""The memory of the host that this process may still use."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

from scalora_dist.distributed.cores import own_cgroups


def available_bytes() -> int:
    """Bytes that this process may still use: what the machine has, within its container's limit.

    A container with a limit on its memory (Docker's ``--memory``, Kubernetes' ``limits.memory``)
    sees all memory of its machine. A process that goes beyond the limit is killed.
    """
    available = int(psutil.virtual_memory().available)
    for folder in own_cgroups():
        with suppress(OSError, ValueError):  # no such file, or "max": no limit
            limit, used = (int((folder / f"memory.{x}").read_text()) for x in ("max", "current"))
            available = min(available, limit - used + _file_cache(folder))
    return max(0, available)


def _file_cache(folder: Path) -> int:
    """Bytes of files that the kernel drops when a cgroup needs memory. They count as used."""
    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(counts.get("inactive_file", 0))
