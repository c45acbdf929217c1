"""The cgroups (version 2) of this process, whose files have the limits of a container."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def own_cgroups() -> list[Path]:
    """Folders of the process's own cgroup and of all above it. They need not exist."""
    group = Path("/")
    with suppress(OSError):
        group /= OWN_GROUP.read_text().strip().rpartition("0::")[2]
    return [CGROUPS / folder.relative_to("/") for folder in (group, *group.parents)]
