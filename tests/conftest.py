from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """``ranks(size)``: that many real ranks, started once per test run."""
    started: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size not in started:
            started[size] = Ranks(size)
        return started[size]

    yield get
    for group in started.values():
        group.close()
