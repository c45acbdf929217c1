"""The shell scripts: checked, and the batch jobs with Slurm's commands played."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BATCH = sorted((REPOSITORY / "launch" / "slurm").glob("*.sbatch"))
HOSTNAMES = '[ "$*" != "show hostnames a[1-2]" ] || printf "a1\\na2\\n"'


def scripts() -> list[Path]:
    """Every shell script that git knows, by its name or first line."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    return [file for file in files if file.is_file() and _is_shell(file)]


def _is_shell(file: Path) -> bool:
    with open(file, "rb") as opened:
        first = opened.readline()
    return file.suffix in (".sh", ".sbatch") or bool(re.match(rb"#!.*\b(ba)?sh\b", first))


def test_shellcheck_finds_nothing() -> None:
    found = scripts()
    names = {str(file.relative_to(REPOSITORY)) for file in found}
    assert names >= {".ci/run", "launch/node.sh", "launch/slurm/job.sh"}
    assert names >= {f"launch/slurm/{kind}.sbatch" for kind in ("deepspeed", "torchrun")}
    shellcheck = Path(sys.executable).parent / "shellcheck"
    checked = subprocess.run([shellcheck, *map(str, found)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.stem)
def test_the_scheduler_gets_its_options(path: Path) -> None:
    """Those after the first command would be ignored."""
    head, _, body = path.read_text().partition("\nset -")
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", head, re.MULTILINE))
    assert len(options) == head.count("#SBATCH") and "#SBATCH" not in body
    assert options["nodes"] == "2" and options["gpus-per-node"] == "8"
    assert options["signal"].startswith("USR1@") and options["requeue"] == ""
    assert (options["open-mode"], options["ntasks-per-node"]) == ("append", "1")


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """``slurm(batch script, srun's script)``: the job's status, and Slurm's commands."""
    commands, calls = tmp_path / "bin", tmp_path / "calls"
    commands.mkdir()

    def run(batch: Path, srun: str, *words: str) -> tuple[int, list[str]]:
        played = {
            "srun": f'echo "srun $MASTER_ADDR $*" >>"{calls}"\n{srun}',
            "scontrol": f'echo "scontrol $*" >>"{calls}"\n{HOSTNAMES}',
        }
        for name, text in played.items():
            (commands / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (commands / name).chmod(0o755)
        calls.write_text("")
        done = subprocess.run(
            ["bash", str(batch), *words],
            cwd=REPOSITORY,
            timeout=60,
            env=os.environ
            | {
                "PATH": f"{commands}:{os.environ['PATH']}",
                "SLURM_JOB_ID": "12345",
                "SLURM_JOB_NODELIST": "a[1-2]",
                "OUTPUT_DIR": str(tmp_path / "run"),
            },
        )
        return done.returncode, calls.read_text().splitlines()

    return run


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.stem)
def test_a_preempted_job_goes_back_into_the_queue(
    slurm: Callable[..., tuple[int, list[str]]], tmp_path: Path, path: Path
) -> None:
    """By the file that the run leaves or by its status; not after an end of another kind."""
    (tmp_path / "run").mkdir()
    mark = tmp_path / "run" / "preempted"
    mark.write_text("of the run before")
    status, calls = slurm(path, f'[ ! -e "{mark}" ]', "--seed=3")
    assert status == 0 and len(calls) == 2
    assert calls[1].startswith("srun a1 ")
    assert f"--output_dir {tmp_path / 'run'} --resume_from_checkpoint latest --seed=3" in calls[1]
    assert " launch/node.sh " in calls[1]
    assert slurm(path, "exit 2")[0] == 2
    for srun, status in ((f'touch "{mark}"; exit 1', 1), ("exit 75", 75)):
        ended, calls = slurm(path, srun)
        assert ended == status and calls[2:] == ["scontrol requeue 12345"]


def test_the_launcher_may_serve_many_ranks(tmp_path: Path) -> None:
    """It inherits the script's limit of open files."""
    python, script = tmp_path / "python", REPOSITORY / "launch" / "node.sh"
    python.write_text("#!/bin/bash\nulimit -Sn\nulimit -Hn\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", f"ulimit -Sn 256; exec {script}"],
        env=os.environ | {"PYTHON": str(python), "NPROC_PER_NODE": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    soft, hard = done.stdout.split()
    assert soft == hard != "256"
