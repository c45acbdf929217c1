"""How many files rank 0 may open."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from scalora_dist.distributed.world import CONNECTIONS, OTHERS, allow_open_files
from scalora_dist.errors import UserError
from tests.support.refusals import one_sentence

FILES = resource.RLIMIT_NOFILE


@pytest.fixture(autouse=True)
def low_limit() -> Iterator[int]:
    """A soft limit of 1024. Yields the hard one."""
    before = resource.getrlimit(FILES)
    resource.setrlimit(FILES, (1024, before[1]))
    yield before[1]
    resource.setrlimit(FILES, before)


def test_the_soft_limit_is_raised_and_never_lowered(low_limit: int) -> None:
    for ranks in (512, 8):
        allow_open_files(ranks)
        assert resource.getrlimit(FILES) == (512 * CONNECTIONS + OTHERS, low_limit)


def test_a_hard_limit_that_is_too_low(low_limit: int) -> None:
    if low_limit == resource.RLIM_INFINITY:
        pytest.skip("this machine has no hard limit")
    with pytest.raises(UserError) as error:
        allow_open_files(low_limit)
    assert f"its hard limit is {low_limit}" in one_sentence(error)
    assert resource.getrlimit(FILES) == (1024, low_limit)
