"""The shared folder: seen by all or not, written to or not, and nothing left in it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.support.ranks import forkserver
from tests.support.workers import doctor as work


def test_a_folder_that_the_other_node_does_not_see(ranks: Any, tmp_path: Path) -> None:
    mine, theirs = tmp_path / "a", tmp_path / "b"
    for folder in (mine, theirs):
        (folder / "runs").mkdir(parents=True)
        (folder / "runs" / "summary.json").write_text("mine")
    found = ranks(2).run(work.shared_folder, [mine, mine], nodes=2)[0]
    assert found.advice is None or not found.fatal, "it may warn of a full disk"
    assert found.found.endswith("seen by all 2 nodes")
    for found in ranks(2).run(work.shared_folder, [mine, theirs], nodes=2):
        assert found.failed and "rank 1 (" in found.found
        assert "does not see what rank 0 writes" in found.found
    left = sorted(tmp_path.rglob("*"))
    files = [folder / "runs" / "summary.json" for folder in (mine, theirs)]
    assert left == sorted([mine, theirs, *(file.parent for file in files), *files])
    assert [file.read_text() for file in files] == ["mine", "mine"]


def test_a_folder_that_cannot_be_written_to(ranks: Any) -> None:
    for failed, text in ranks(2).run(work.whole, Path("/proc/scalora")):
        assert failed == 1
        assert not text or "FAIL  shared folder   /proc: rank 0 cannot write there (" in text


def test_a_new_folder_is_neither_made_nor_left(ranks: Any, tmp_path: Path) -> None:
    (failed, text), _ = ranks(2).run(work.whole, tmp_path / "new" / "runs")
    assert failed == 0 and f"shared folder   {tmp_path}: " in text
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing(tmp_path: Path) -> None:
    process = forkserver().Process(target=work.killed_with_a_folder, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -9
    deadline = time.monotonic() + 20
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []
