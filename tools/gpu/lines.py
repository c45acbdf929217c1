"""A pytest plugin: one line for each test, and a JSON file that is written anew after each.

python -m pytest -p tools.gpu.lines --lines FILE …
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

WORDS = {"passed": "pass", "failed": "FAIL", "skipped": "skip"}


class Lines:
    """Collects the outcome of each test.

    Attributes:
        file: the JSON file.
        rows: one row a test: its name, outcome, seconds, and why it failed or was skipped.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test has a line of its own for its call, and for what fails or is skipped around it.
        if report.when == "call" or not report.passed:
            self.add(report)

    def add(self, report: pytest.TestReport) -> None:
        where, _, name = report.nodeid.partition("::")
        row = {
            "check": name.removeprefix("test_").replace("_", " "),
            "file": where,
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
        }
        if not report.passed:
            row["why"] = _why(report)
        self.rows.append(row)
        self.file.write_text(json.dumps({"rows": self.rows}, indent=2) + "\n")
        why = f": {row['why']}" if "why" in row else ""
        print(f"  {WORDS[report.outcome]}  {row['check']}{why}", flush=True)


def _why(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    errors = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return " ".join(errors[-1].split()[1:]) if errors else report.longreprtext[-200:]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, help="JSON file of the outcomes")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("lines"):
        config.pluginmanager.register(Lines(file))
