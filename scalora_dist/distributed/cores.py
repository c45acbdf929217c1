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


def _quota() -> float:
    """The least limit of the cgroups (version 2) of this process, in cores; infinity: none."""
    group, quota = Path("/"), math.inf
    with suppress(OSError):
        group /= OWN_GROUP.read_text().strip().rpartition("0::")[2]
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # no such file, or "max": no limit
            time, period = (CGROUPS / folder.relative_to("/") / "cpu.max").read_text().split()
            quota = min(quota, int(time) / int(period))
    return quota
