"""The limit of open files of the process that serves the store. Each connection to it is one."""

from __future__ import annotations

import resource

from scalora_dist.errors import UserError

CONNECTIONS = 4  # of each rank: its own, the watchdog's, and two for stop signals
OTHERS = 1024  # files for all else, the usual limit


def allow_open_files(ranks: int) -> None:
    """Raise this process's soft limit to what serving ``ranks`` ranks takes.

    Raises:
        UserError: the hard limit is lower.
    """
    needed = CONNECTIONS * ranks + OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"rank 0 needs {needed} open files to serve {ranks} ranks, and its hard limit is "
            f"{hard}: raise it (ulimit -Hn, LimitNOFILE of systemd, --ulimit nofile of Docker)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
