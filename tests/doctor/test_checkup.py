"""How checks that fail, raise or hang end, on real ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import Ranks
from tests.support.workers import doctor as work


def test_an_error_on_all_ranks_is_a_line_and_the_next_check_is_tried(ranks: Any) -> None:
    (failed, text), other = ranks(2).run(work.raising, {0, 1})
    assert failed == 1 and other == (1, ""), "rank 0 prints"
    first, second, _, third = text.splitlines()
    assert first.split() == ["ok", "first", "fine"]
    assert re.fullmatch(r" +FAIL +second +rank (\d) \(.*\): ValueError: seen by \1", second)
    assert third.split() == ["ok", "third", "sum", "2"]


def test_after_an_error_on_some_ranks_nothing_more_is_tried(ranks: Any) -> None:
    (failed, text), other = ranks(2).run(work.raising, {1})
    assert failed == 1 and other == (1, "")
    assert "FAIL  second          rank 1 (" in text and "ValueError: seen by 1" in text
    assert "-     third           not tried: " in text


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("hangs", "error: rank 1 hangs in the check of all-reduce at doctor.py:"),
        ("raises", "error: rank 1: the check of all-reduce failed: rank 1 ("),
    ],
)
def test_a_rank_that_leaves_the_others_in_a_collective_ends_all(
    tmp_path: Path, how: str, says: str
) -> None:
    log, group = tmp_path / "log", Ranks(2)
    with pytest.raises(EOFError):
        group.run(work.left_alone, log, how, timeout=60)
    for process in group.processes:
        process.join(30)
        assert process.exitcode == 1
    lines = log.read_text().splitlines()
    assert lines[0].split() == ["ok", "links", "fine"]
    (sentence,) = [line for line in lines if line.startswith("error: ")]
    assert sentence.startswith(says) and sentence.endswith("ending the job")
    assert how == "hangs" or "ValueError: no such device" in sentence
