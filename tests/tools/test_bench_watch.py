"""The tool that measures the watch, on a few ranks."""

from __future__ import annotations

import pytest

from tools import bench_watch


@pytest.mark.heavy
def test_a_few_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_watch, "SETTLE", 3.0)
    found = bench_watch.measure(ranks=6, each=2, seconds=3)
    assert 0 < found["start_mean_rank"] < 2 and 0 < found["start_store"] < 2
    assert found["second_bytes"] > 6 * 100, "each node writes a row and reads a board"
