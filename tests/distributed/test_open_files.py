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


def test_the_hard_limit_is_enough_where_it_has_room_for_the_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run on one rank, after `ulimit -n 1024`, which lowers both limits."""
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    for limits in ((1024, 1024), (200, 300)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, given=limits: given)
        allow_open_files(1)
    assert raised == [(300, 300)]


def test_a_hard_limit_that_is_too_low(low_limit: int) -> None:
    if low_limit == resource.RLIM_INFINITY:
        pytest.skip("this machine has no hard limit")
    with pytest.raises(UserError) as error:
        allow_open_files(low_limit)
    assert f"its hard limit is {low_limit}" in one_sentence(error)
    assert resource.getrlimit(FILES) == (1024, low_limit)
