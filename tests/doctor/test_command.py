"""`scalora doctor` as a user starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import launched, nodes, runs
from tests.support.ranks import free_port


@pytest.mark.heavy
def test_two_nodes_are_found_ready(tmp_path: Path) -> None:
    """A table without any other output, and nothing left on the disk."""
    with nodes.two_nodes(tmp_path) as pair:
        folder = tmp_path / "shared"
        folder.mkdir()
        for node in pair:
            node.start({"output_dir": folder / "run"}, COMMAND="doctor")
        for node in pair:
            assert node.wait() == 0, node.text()
        title = "scalora doctor: 2 rank(s) on 2 node(s)"
        _, title, table = pair[0].text().partition(title)  # a launcher may say something before
        lines = [title, *table.strip("\n").splitlines()]
        assert title, pair[0].text()
        assert lines[-1].startswith("ready to train (")
        marks = [line[2:6].strip() for line in lines[1:-2] if line[2:6].strip()]
        assert set(marks) <= {"ok", "warn"} and len(marks) == 14, pair[0].text()
        assert re.search(r"interconnect +all-reduce: [\d.]+ GB/s between nodes", pair[0].text())
        assert "  ok  " not in pair[1].text(), "rank 0 alone prints"
        assert list(folder.iterdir()) == []


@pytest.mark.heavy
def test_a_failed_check_is_status_1_and_a_rank_that_never_comes_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scalora_dist", "doctor", "--output_dir", "/proc"]
    environment = os.environ | launched.ENVIRONMENT
    failing = subprocess.Popen(
        command, cwd=runs.REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    )
    port = str(free_port())
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    late = subprocess.run(
        [*command, "--ddp_timeout", "1"],
        cwd=runs.REPOSITORY,
        env=environment | alone,
        capture_output=True,
        text=True,
    )
    assert late.returncode == 2
    assert late.stderr.startswith(f"error: the 2 ranks did not meet at 127.0.0.1:{port} in 1 s: ")
    text, _ = failing.communicate(timeout=120)
    assert failing.returncode == 1
    assert "-     ZeRO-3          not tried: the engines need the shared folder" in text
    assert text.strip().splitlines()[-1].startswith("1 check(s) failed (")
