"""The exceptions that end a run with a one-sentence message, and the exit of a rank after them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Launchers kill all ranks when one exits. So the others wait this long for rank 0's message.
PATIENCE_SECONDS = 30


class RunExit(Exception):
    """Ends the run with a one-sentence message and an exit status."""

    status: int


class UserError(RunExit):
    """A mistake that the user can fix. The message is one sentence that says what to do."""

    status = 2


class ReplicasDiffer(RunExit):
    """Copies of one tensor differ between ranks. A device or its driver may be faulty."""

    status = 1


class Preempted(RunExit):
    """The run was asked to stop. All is saved, and the same command line resumes (EX_TEMPFAIL)."""

    status = 75


def is_rank_0() -> bool:
    """By the launcher's environment, so also before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def exit_with_one_sentence(failing: Callable[[], None] | None = None) -> Iterator[None]:
    """Turn a RunExit into its message on rank 0's stderr and its exit status on every rank.

    Another rank prints its error too, if it still runs after ``PATIENCE_SECONDS``.

    Args:
        failing: called first after any exception but Preempted.
    """
    try:
        try:
            yield
        except Preempted:
            raise
        except BaseException:
            if failing:
                failing()
            raise
    except Preempted as ending:  # on all ranks at the same step
        if is_rank_0():
            print(ending, file=sys.stderr)
        _leave(ending.status)
    except RunExit as error:
        rank = int(os.environ.get("RANK", "0"))
        who = ""
        if rank:
            time.sleep(PATIENCE_SECONDS)
            who = f"rank {rank}: "  # still running, so rank 0 did not see this error
        print(f"error: {who}{error}", file=sys.stderr)
        _leave(error.status)


def _leave(status: int) -> None:
    """Exit without the interpreter's clean-up, which waits for ranks that may never answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
