"""A batch job that is preempted and comes back, Slurm's commands being played."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import launched, runs, tiny_runs

# As Slurm does: the command on every node, each knowing which it is; the largest status.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
    SLURM_NODEID=$node SLURM_JOB_NUM_NODES=2 "$@" &
done
largest=0
for task in $(jobs -p); do
    status=0
    wait "$task" || status=$?
    largest=$((status > largest ? status : largest))
done
exit "$largest"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$2" = hostnames ]; then
    echo localhost
else
    echo "$*" >>"$REQUEUED"
fi
"""


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "engine"), [("torchrun", "fsdp"), ("deepspeed", "zero3")])
def test_a_preempted_job_comes_back_and_goes_on(
    ranks: Any, odd: Path, tmp_path: Path, kind: str, engine: str
) -> None:
    """The signal comes to every process of the step but the batch script, as from Slurm."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 3\n")
    case = tiny_runs.options(odd, tmp_path / "run", engine, max_steps=12, save_steps=0, seed=3)
    given = {
        "RECIPE": recipe,
        "OUTPUT_DIR": case["output_dir"],
        "NPROC_PER_NODE": 1,
        "ENGINE": " ".join(runs.words(runs.engine_options(engine, tmp_path))),
        "SLURM_JOB_ID": os.getpid(),
        "SLURM_JOB_NODELIST": "nodes",
        "REQUEUED": tmp_path / "requeued",
        **launched.ENVIRONMENT,
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    left_out = ("output_dir", "seed", "fsdp", "ds_config")
    words = runs.words({name: value for name, value in case.items() if name not in left_out})

    def submit(log: Path) -> subprocess.Popen[bytes]:
        with open(log, "w") as file:
            return subprocess.Popen(
                ["bash", f"launch/slurm/{kind}.sbatch", *words],
                cwd=runs.REPOSITORY,
                env=os.environ | {name: str(value) for name, value in given.items()},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    first = submit(tmp_path / "first")
    deadline = time.monotonic() + 200
    while launched.last_step(tmp_path / "run") < 3:
        assert first.poll() is None and time.monotonic() < deadline, (
            tmp_path / "first"
        ).read_text()
        time.sleep(0.01)
    _srun, *step_processes = psutil.Process(first.pid).children(recursive=True)
    for process in step_processes:
        process.send_signal(signal.SIGUSR1)
    assert first.wait(120) == 75, (tmp_path / "first").read_text()
    step = launched.last_step(tmp_path / "run")
    assert 3 <= step < 12
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert submit(tmp_path / "second").wait(300) == 0, (tmp_path / "second").read_text()
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert f"checkpoint-{step}" in (tmp_path / "second").read_text()
    ranks(2).run(tiny_runs.train, {**case, "output_dir": tmp_path / "alone"})
    assert tiny_runs.lines(tmp_path / "run") == tiny_runs.lines(tmp_path / "alone")
