"""The processor cores that this process may use."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def cores() -> int:
    """Number of cores that this process may use: those it may run on, within its CPU quota.

    A container with a limit on its CPU time (Docker's ``--cpus``, Kubernetes' ``limits.cpu``) sees
    all cores of its machine. More threads than the limit would be stopped in turn.
    """
    return max(1, math.floor(min(len(os.sched_getaffinity(0)), _quota())))


def own_cgroups() -> list[Path]:
    """Folders of this process's cgroup (version 2) and of all above it. They need not exist.

    Their files have the limits of a container.
    """
    group = Path("/")
    with suppress(OSError):
        group /= OWN_GROUP.read_text().strip().rpartition("0::")[2]
    return [CGROUPS / folder.relative_to("/") for folder in (group, *group.parents)]


def _quota() -> float:
    """The least limit of the cgroups (version 2) of this process, in cores; infinity: none."""
    quota = math.inf
    for folder in own_cgroups():
        with suppress(OSError, ValueError):  # no such file, or "max": no limit
            time, period = (folder / "cpu.max").read_text().split()
            quota = min(quota, int(time) / int(period))
    return quota
