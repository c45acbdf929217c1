"""The one exception that a user's mistake raises, and how a rank leaves after it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Launchers kill all ranks as soon as one has left, so the others give rank 0 this long to speak.
PATIENCE_SECONDS = 30


class UserError(Exception):
    """A mistake the user can mend: one sentence that says what to do."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a UserError into its sentence on rank 0's stderr and exit status 2 on every rank."""
    try:
        yield
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        who = ""
        if rank:
            time.sleep(PATIENCE_SECONDS)
            who = f"rank {rank}: "  # still alive, so rank 0 did not see this mistake
        print(f"error: {who}{error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # Without the interpreter's clean-up, which waits for ranks that may never answer.
        os._exit(2)
