"""Runs whose batches are read by processes of their own: the same numbers, and no process left."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from scalora_dist.training.trainer import Trainer
from tests.support import runs, tiny_models, tiny_runs
from tests.support.forked import Forked

WORKERS = 2
PREEMPTED = 75  # exit status


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


def case(task: Path, output: Path, **others: Any) -> dict[str, Any]:
    """Options of a run with workers, on one rank. Dropout draws random numbers."""
    options = {"max_steps": 6, "save_steps": 3, "save_model": True, "lora_dropout": 0.1}
    options |= {"dataloader_num_workers": WORKERS, "eval_steps": 2, "eval_size": 5}
    return tiny_runs.options(task, output, "local", **options | others)


def test_workers_change_no_number(ranks: Any, task: Path, tmp_path: Path) -> None:
    """Nor do they in a resumed run. The models are the same bit for bit."""
    alone, run = tmp_path / "alone", tmp_path / "run"
    ranks(1).run(tiny_runs.train, case(task, alone, dataloader_num_workers=0))
    expected = tiny_runs.left(alone)
    expected[1]["output_dir"] = str(run)
    for more in ({}, {"resume_from_checkpoint": "latest", "dataloader_num_workers": 1}):
        with Forked(1, case(task, run, **more), tmp_path / "log") as forked:
            assert forked.wait() == [0], forked.text()
        assert tiny_runs.left(run) == expected
        shutil.rmtree(run / "checkpoint-6")


def workers_of(forked: Forked) -> list[psutil.Process]:
    """The workers of a run that has taken a step."""
    return psutil.Process(forked.ranks[0].pid).children()


def are_gone(workers: list[psutil.Process], seconds: float) -> bool:
    """Whether all workers end within that time."""
    _, alive = psutil.wait_procs(workers, timeout=seconds)
    return not alive


def started(forked: Forked, folder: Path) -> list[psutil.Process]:
    """Wait until the run has taken a step. Returns its workers."""
    metrics = folder / "metrics.jsonl"
    assert forked.wait_for(lambda: metrics.exists() and runs.losses(folder)), forked.text()
    workers = workers_of(forked)
    assert len(workers) == WORKERS
    return workers


@pytest.mark.heavy
def test_a_signal_to_all_processes_lets_the_run_save(task: Path, tmp_path: Path) -> None:
    """As from Slurm: to the workers first."""
    long = case(task, tmp_path / "run", max_steps=10**5, save_steps=0, eval_steps=0)
    with Forked(1, long, tmp_path / "log") as forked:
        workers = started(forked, tmp_path / "run")
        for number in (signal.SIGUSR1, signal.SIGTERM):
            for worker in workers:
                os.kill(worker.pid, number)
        time.sleep(0.5)
        assert forked.running() and all(worker.is_running() for worker in workers)
        forked.send(signal.SIGTERM, [0])
        assert forked.wait() == [PREEMPTED], forked.text()
        assert are_gone(workers, 10)
    assert len(tiny_runs.sound(tmp_path / "run")) == 1


class Broken(Trainer):
    def take_step(self, step: int, *args: Any) -> Any:
        if step == 1:
            time.sleep(0.5)
            raise ArithmeticError("broken on purpose")
        return super().take_step(step, *args)


def test_workers_end_with_a_run_that_fails(task: Path, tmp_path: Path) -> None:
    with Forked(1, case(task, tmp_path / "run"), tmp_path / "log", Broken) as forked:
        workers = started(forked, tmp_path / "run")
        assert forked.wait() == [1] and "broken on purpose" in forked.text()
        assert are_gone(workers, 10)


class Bereft(Trainer):
    """Its workers die after the last step."""

    def _evaluate(self, log: Any, step: int, *args: Any, **others: Any) -> Any:
        if step == self.feed.steps:
            for worker in multiprocessing.active_children():
                worker.kill()
            time.sleep(0.5)
        return super()._evaluate(log, step, *args, **others)


def test_a_worker_that_dies_after_the_last_step_ends_no_run(task: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Forked(1, case(task, run), tmp_path / "log", Bereft) as forked:
        assert forked.wait() == [0], forked.text()
    assert "eval_loss" in tiny_runs.lines(run)[-1]


@pytest.mark.heavy
def test_workers_end_with_a_run_that_is_killed(task: Path, tmp_path: Path) -> None:
    long = case(task, tmp_path / "run", max_steps=10**5, save_steps=0, eval_steps=0)
    with Forked(1, long, tmp_path / "log") as forked:
        workers = started(forked, tmp_path / "run")
        forked.send(signal.SIGKILL, [0])
        assert are_gone(workers, 30)  # they look every 5 s
