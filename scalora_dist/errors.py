"""The one exception that a user's mistake raises."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend: one sentence that says what to do.

    The entry point prints it from rank 0 and every rank exits with status 2.
    """
