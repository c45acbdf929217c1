"""The exceptions that end a run with one sentence, and how a rank leaves after them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Launchers kill all ranks as soon as one has left, so the others give rank 0 this long to speak.
PATIENCE_SECONDS = 30


class RunExit(Exception):
    """Ends the run with a sentence and a status."""

    status: int


class UserError(RunExit):
    """A mistake the user can mend: one sentence that says what to do."""

    status = 2


class Preempted(RunExit):
    """Asked to stop: all is saved, and the same command line goes on (EX_TEMPFAIL)."""

    status = 75


@contextmanager
def exit_with_one_sentence() -> Iterator[None]:
    """Turn an RunExit into its sentence on rank 0's stderr and its exit status on every rank."""
    try:
        yield
    except Preempted as ending:  # on all ranks at the same step
        if os.environ.get("RANK", "0") == "0":
            print(ending, file=sys.stderr)
        _leave(ending.status)
    except RunExit as error:
        rank = int(os.environ.get("RANK", "0"))
        who = ""
        if rank:
            time.sleep(PATIENCE_SECONDS)
            who = f"rank {rank}: "  # still alive, so rank 0 did not see this mistake
        print(f"error: {who}{error}", file=sys.stderr)
        _leave(error.status)


def _leave(status: int) -> None:
    """Without the interpreter's clean-up, which waits for ranks that may never answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
