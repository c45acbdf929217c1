"""What a refusal must look like, whoever refuses."""

from __future__ import annotations

import pytest

from scalora_dist.errors import UserError


def one_sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    """The message, which must be there and on one line."""
    message = str(error.value)
    assert message and "\n" not in message
    return message
