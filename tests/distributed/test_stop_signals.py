"""A signal at the very end of a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import runs

PROGRAM = """
import os, signal
from scalora_dist.distributed.stop_signals import StopSignals

with StopSignals() as signals:
    signals.finish()
    {ends}
os.kill(os.getpid(), signal.{number})
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
def test_a_signal_after_the_end_changes_no_status(number: str) -> None:
    def status(ends: str) -> int:
        program = PROGRAM.format(ends=ends, number=number)
        return subprocess.run([sys.executable, "-c", program], cwd=runs.REPOSITORY).returncode

    assert status("signals.outlast()") == 0
    assert status("pass") != 0  # elsewhere the handlers of before are back
