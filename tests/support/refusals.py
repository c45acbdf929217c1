"""Checks the form of a UserError's message, for the tests of all packages."""

from __future__ import annotations

import pytest

from scalora_dist.errors import UserError


def one_sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    """The error's message. Asserts that it is one non-empty line."""
    message = str(error.value)
    assert message and "\n" not in message
    return message
