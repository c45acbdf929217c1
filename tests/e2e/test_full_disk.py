"""A disk that is full during a save, while results are written, or at the start."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from scalora_dist.distributed.stop_signals import PREEMPTED
from scalora_dist.distributed.world import World
from scalora_dist.training.phases import Phases
from scalora_dist.training.run_log import RunLog
from scalora_dist.training.trainer import Trainer
from tests.support import launched, runs, tiny_models, tiny_runs
from tests.support.forked import Forked
from tests.support.ranks import Ranks

GetRanks = Callable[[int], Ranks]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


# Room for one checkpoint of 2 ranks (some 170 kB), metrics and events, not for two.
DISK_BYTES = 300_000
ALONE_BYTES = 70_000  # so much smaller is one process's


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a disk can only be filled where tmpfs may be mounted: {mounted.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


FULL = {"max_steps": 9, "save_steps": 2, "save_total_limit": 3, "eval_steps": 4}


def full_disk_case(task: Path, disk: Path, engine: str, on_failure: str) -> dict[str, Any]:
    if engine == "local":
        (disk / "ballast").write_bytes(bytes(ALONE_BYTES))
    return tiny_runs.options(task, disk / "run", engine, on_save_failure=on_failure, **FULL)


def check_disk(folder: Path, warned: str) -> None:
    """Only the second checkpoint's failure shows."""
    assert tiny_runs.sound(folder) == [2]
    assert not list(folder.glob("*.partial"))
    assert "checkpoint-4 could not be written (rank " in warned
    assert "No space left on device" in warned and "earlier checkpoints are intact" in warned


@pytest.mark.parametrize(
    ("size", "engine"),
    [(1, "local"), (2, "fsdp"), pytest.param(2, "zero3", marks=pytest.mark.heavy)],
)
def test_a_full_disk_does_not_end_the_run(
    ranks: GetRanks, task: Path, disk: Path, tmp_path: Path, size: int, engine: str
) -> None:
    """All lines are there, although the disk was full while some were written."""
    case = full_disk_case(task, disk, engine, "continue")
    answers = ranks(size).run(tiny_runs.train, case)
    for _, _, warned in answers:
        check_disk(disk / "run", "\n".join(warned))
    elsewhere = {**case, "output_dir": tmp_path / "elsewhere"}
    ranks(size).run(tiny_runs.train, elsewhere)
    assert tiny_runs.lines(disk / "run") == tiny_runs.lines(tmp_path / "elsewhere")


@pytest.mark.parametrize(("size", "engine"), [(2, "fsdp"), (2, "zero3")])
def test_a_full_disk_ends_the_run_where_asked(
    ranks: GetRanks, task: Path, disk: Path, size: int, engine: str
) -> None:
    case = full_disk_case(task, disk, engine, "stop")
    for sentence, status, warned in ranks(size).run(tiny_runs.refusal, case):
        assert status == 2
        assert "checkpoint-4 could not be written" in sentence and "\n" not in sentence
        assert "free some space" in sentence
        check_disk(disk / "run", "\n".join(warned))
    assert 4 <= launched.last_step(disk / "run") <= 6


@pytest.mark.heavy
@pytest.mark.parametrize(("on_failure", "status"), [("continue", 0), ("stop", 2)])
def test_the_status_after_a_full_disk(
    task: Path, disk: Path, tmp_path: Path, on_failure: str, status: int
) -> None:
    case = full_disk_case(task, disk, "local", on_failure)
    with Forked(1, case, tmp_path / "log") as run:
        assert run.wait() == [status], run.text()
    check_disk(disk / "run", run.text())
    assert run.text().count("error: ") == (on_failure == "stop")
    assert "Traceback" not in run.text()


def full_at(
    world: World, case: dict[str, Any], blocked: str, ballast: Path
) -> tuple[str, int, list[str]]:
    """Train on a disk that is full once the results before ``blocked`` are written."""
    before = {"adapter": "evaluation", "model": "adapter", "summary.json": "model"}[blocked]

    class Filled(Phases):
        def finish(self, phase: str, *others: Any, **found: Any) -> None:
            super().finish(phase, *others, **found)
            if phase == before:
                with open(ballast, "wb", buffering=0) as file, suppress(OSError):
                    while file.write(bytes(256)):
                        pass

    class Disk(Trainer):
        def run(self) -> dict[str, Any]:
            self.results.phases.__class__ = Filled
            return super().run()

    return tiny_runs.refusal(world, case, Disk)


@pytest.mark.parametrize("blocked", ["adapter", "model", "summary.json"])
def test_a_full_disk_while_results_are_written(
    ranks: GetRanks, task: Path, disk: Path, tmp_path: Path, blocked: str
) -> None:
    """One sentence; with space again, the run is finished without another step."""
    alone, folder = tmp_path / "alone", disk / "run"
    case = tiny_runs.options(task, alone, "local", max_steps=2, method="lora", save_model=True)
    ranks(1).run(tiny_runs.train, case)

    here = {**case, "output_dir": folder, "resume_from_checkpoint": "latest"}
    sentence, status, _ = ranks(1).run(full_at, here, blocked, disk / "ballast")[0]
    assert status == 2 and "\n" not in sentence
    assert f"{folder / blocked} could not be written (No space left on device)" in sentence
    assert tiny_runs.sound(folder) == [2]
    (disk / "ballast").unlink()
    first, *_ = ranks(1).run(tiny_runs.train, here)[0]
    assert first == 2
    expected = tiny_runs.left(alone)
    found = tiny_runs.left(folder)
    assert found[::2] == expected[::2]
    assert {**found[1], "output_dir": ""} == {**expected[1], "output_dir": ""}


@pytest.mark.heavy
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_a_full_disk_is_no_preemption(task: Path, disk: Path, tmp_path: Path, engine: str) -> None:
    """The model does not fit. The launcher's signal to the other rank leaves no mark."""
    (disk / "ballast").write_bytes(bytes(40_000))
    others = {"max_steps": 2, "save_steps": 0, "save_model": True, "method": "lora"}
    case = tiny_runs.options(task, disk / "run", engine, **others)
    with Forked(2, case, tmp_path / "log") as run:
        assert run.wait()[0] == 2, run.text()
    assert f"{disk / 'run' / 'model'} could not be written" in run.text()
    assert tiny_runs.sound(disk / "run") == [2]
    assert not (disk / "run" / PREEMPTED).exists()
    assert not list((disk / "run").glob("*.partial"))


def test_a_disk_that_is_full_at_the_start(
    ranks: GetRanks, task: Path, disk: Path, tmp_path: Path
) -> None:
    with open(disk / "ballast", "wb", buffering=0) as ballast, suppress(OSError):
        while ballast.write(bytes(256)):
            pass
    case = tiny_runs.options(task, disk / "run", "local", max_steps=2)
    sentence, status, _ = ranks(1).run(tiny_runs.refusal, case)[0]
    assert status == 2 and "\n" not in sentence
    assert "could not be written (No space left on device)" in sentence


def test_lines_wait_for_space(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """metrics.jsonl on a disk that is full for some steps, in the middle of a line."""
    log = RunLog(disk, is_main=True, first_step=0, steps=900, logging_steps=1000)
    for step in range(1, 901):
        if step == 200:
            with open(disk / "ballast", "wb", buffering=0) as ballast, suppress(OSError):
                while ballast.write(bytes(4096)):
                    pass
        if step == 700:
            assert launched.last_step(disk) < 600
            (disk / "ballast").unlink()
        log.step({"step": step, "loss": step / 7, "tokens": 1, "seconds": 1.0})
    log.sync()
    log.close()
    assert [line["step"] for line in runs.metrics(disk)] == list(range(1, 901))
    told = [r.getMessage() for r in caplog.records if "wait for space" in r.getMessage()]
    assert len(told) == 1 and "No space left" in told[0] and "metrics.jsonl" in told[0]
