"""The processor cores that this process may use."""

from __future__ import annotations

import math
import os
from contextlib import suppress

from scalora_dist.distributed.cgroups import own_cgroups


def cores() -> int:
    """Number of cores that this process may use: those it may run on, within its CPU quota.

    A container with a limit on its CPU time (Docker's ``--cpus``, Kubernetes' ``limits.cpu``) sees
    all cores of its machine. More threads than the limit would be stopped in turn.
    """
    return max(1, math.floor(min(len(os.sched_getaffinity(0)), _quota())))


def _quota() -> float:
    """The least limit of the cgroups (version 2) of this process, in cores; infinity: none."""
    quota = math.inf
    for folder in own_cgroups():
        with suppress(OSError, ValueError):  # no such file, or "max": no limit
            time, period = (folder / "cpu.max").read_text().split()
            quota = min(quota, int(time) / int(period))
    return quota
