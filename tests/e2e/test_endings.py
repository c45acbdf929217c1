"""How a run ends early: a signal, a loss that stays NaN, a checkpoint that is bad."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scalora_dist.checkpoint.manifest import checkpoints, read_state
from scalora_dist.distributed.stop_signals import PREEMPTED as PREEMPTED_MARK
from scalora_dist.distributed.world import World
from scalora_dist.training.trainer import Trainer
from tests.support import launched, runs, tiny_models, tiny_runs
from tests.support.forked import Forked
from tests.support.ranks import Ranks

GetRanks = Callable[[int], Ranks]

PREEMPTED = 75  # EX_TEMPFAIL
LONG = {"max_steps": 15, "save_steps": 0, "eval_steps": 6}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


# Signals.


def test_a_signal_ends_one_process_with_75(ranks: GetRanks, task: Path, tmp_path: Path) -> None:
    case = tiny_runs.options(task, tmp_path / "run", "local", **LONG)
    with launched.Launched("local", case, tmp_path / "log") as run:
        assert run.wait_for(lambda: launched.last_step(tmp_path / "run") >= 3), run.text()
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == PREEMPTED, run.text()
    check_preempted(ranks(1), case, run.text())


# A launcher's own status: see README.
@pytest.mark.heavy
@pytest.mark.parametrize(
    ("engine", "number", "whom", "status"),
    [
        ("fsdp", signal.SIGUSR1, "one rank", 1),
        ("zero3", signal.SIGTERM, "launcher", 1),
    ],
)
def test_a_signal_ends_ranks_after_a_save(
    ranks: GetRanks,
    task: Path,
    tmp_path: Path,
    engine: str,
    number: signal.Signals,
    whom: str,
    status: int,
) -> None:
    """Through its launcher, or only the last rank; what the launcher makes of it."""
    case = tiny_runs.options(task, tmp_path / "run", engine, **LONG)
    with launched.Launched(engine, case, tmp_path / "log") as run:
        assert run.wait_for(lambda: launched.last_step(tmp_path / "run") >= 3), run.text()
        target = run.launcher() if whom == "launcher" else run.ranks()[-1]
        target.send_signal(number)
        assert run.wait() == status, run.text()
    check_preempted(ranks(2), case, run.text())


def check_preempted(ranks: Ranks, case: dict[str, Any], text: str) -> None:
    """The step was finished and saved, one sentence says so, and the run goes on as if never."""
    folder = case["output_dir"]
    step = launched.last_step(folder)
    assert 3 <= step < case["max_steps"]
    assert tiny_runs.sound(folder) == [step]
    sentences = [line for line in text.splitlines() if "stopped by" in line]
    assert len(sentences) == 1 and f"checkpoint-{step} is written" in sentences[0], text
    assert "Traceback" not in text.partition("stopped by")[0]
    assert (folder / PREEMPTED_MARK).read_text() == f"{step}\n"
    time.sleep(1.1)  # TensorBoard takes its files in the order of the seconds in their names
    answers = ranks.run(tiny_runs.train, {**case, "resume_from_checkpoint": "latest"})
    assert [first for first, *_ in answers] == [step] * ranks.size
    assert not (folder / PREEMPTED_MARK).exists()
    whole = {**case, "output_dir": folder.with_name("uninterrupted")}
    ranks.run(tiny_runs.train, whole)
    assert tiny_runs.lines(folder) == tiny_runs.lines(whole["output_dir"])
    assert drawn(folder) == drawn(whole["output_dir"]) == list(range(1, case["max_steps"] + 1))


def drawn(folder: Path) -> list[int]:
    """The steps whose loss TensorBoard shows."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    return [event.step for event in events.Reload().Scalars("train/loss")]


# A loss that stays NaN.

POISONED = 6  # the first step whose loss is NaN


class Poisoned(Trainer):
    def take_step(self, step: int, *args: Any) -> Any:
        if step + 1 == POISONED:
            self.model.lm_head.register_forward_hook(lambda *call: call[2] * math.nan)
        return super().take_step(step, *args)


def poisoned(world: World, case: dict[str, Any]) -> tuple[str, int, list[str]]:
    return tiny_runs.refusal(world, case, Poisoned)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that rank 0 wrote but random states."""
    found = load_file(checkpoint / "rank-00000.safetensors")
    return {name: tensor for name, tensor in found.items() if not name.startswith("random")}


@pytest.mark.parametrize(
    ("size", "engine"),
    [
        (1, "local"),
        *(pytest.param(2, x, marks=pytest.mark.heavy) for x in ("zero3", "fsdp", "zero0", "zero2")),
    ],
)
def test_a_loss_that_stays_nan_ends_the_run(
    ranks: GetRanks, task: Path, tmp_path: Path, size: int, engine: str
) -> None:
    """The last good checkpoint is named, is still there, and goes on with another rate."""
    folder = tmp_path / "run"
    case = tiny_runs.options(
        task,
        folder,
        engine,
        max_steps=20,
        save_steps=1,
        save_total_limit=2,
        max_skipped_steps=4,
        lr_scheduler_type="constant",
    )
    for sentence, status, warned in ranks(size).run(poisoned, case):
        assert status == 2 and "\n" not in sentence
        assert f"not finite for 4 steps in a row, from step {POISONED} on" in sentence
        assert f"the last good checkpoint is {folder / f'checkpoint-{POISONED - 1}'}:" in sentence
        assert len([line for line in warned if "skipped" in line]) == 4
    assert tiny_runs.sound(folder) == [POISONED - 1, POISONED - 2]
    steps = [line for line in tiny_runs.lines(folder) if "loss" in line]
    assert [line["step"] for line in steps if "skipped_step" in line] == [6, 7, 8, 9]
    assert all(line["rescale"]["skipped"] == 14 for line in steps if "skipped_step" in line)
    assert [line["loss"] is None for line in steps] == [False] * 5 + [True] * 4
    healthy = {**case, "output_dir": tmp_path / "healthy", "max_steps": POISONED - 1}
    ranks(size).run(tiny_runs.train, healthy)
    good = folder / f"checkpoint-{POISONED - 1}"
    expected = tensors(tmp_path / "healthy" / good.name)
    found = tensors(good)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def asked_while_poisoned(world: World, case: dict[str, Any]) -> None:
    """As if the run were preempted after two skipped steps."""
    from scalora_dist.errors import Preempted

    class Asked(Poisoned):
        def take_step(self, step: int, *args: Any) -> Any:
            if step + 1 == POISONED + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().take_step(step, *args)

    with pytest.raises(Preempted):
        runs.make(world, case, Asked).run()


@pytest.mark.parametrize(
    ("size", "engine"), [(1, "local"), (2, "fsdp"), (2, "zero0"), (2, "zero3")]
)
def test_skipped_steps_change_nothing(
    ranks: GetRanks, task: Path, tmp_path: Path, size: int, engine: str
) -> None:
    """Weights, factors and moments after two skipped steps are those before them."""
    case = tiny_runs.options(task, tmp_path / "run", engine, max_steps=20, save_steps=POISONED - 1)
    ranks(size).run(asked_while_poisoned, case)
    assert tiny_runs.sound(tmp_path / "run") == [POISONED + 1, POISONED - 1]
    before, after = (tensors(tmp_path / "run" / f"checkpoint-{n}") for n in (5, 7))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    states = [read_state(tmp_path / "run" / f"checkpoint-{n}") for n in (5, 7)]
    for key in ("engine", "schedule"):
        assert states[0][key] == states[1][key]
    assert states[0]["progress"]["steps_taken"] == states[1]["progress"]["steps_taken"]


# A damaged checkpoint.


def test_a_damaged_checkpoint_in_a_whole_run(task: Path, tmp_path: Path) -> None:
    """Named: status 2. latest: the one before, with a warning, and the same run in the end."""
    case = tiny_runs.options(task, tmp_path / "run", "local", max_steps=7, save_steps=2)

    def start(name: str, status: int, **others: Any) -> str:
        """Train in a process of its own; what it prints."""
        with Forked(1, {**case, **others}, tmp_path / name) as run:
            assert run.wait() == [status], run.text()
            return run.text()

    start("whole", 0)
    expected = tiny_runs.lines(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint-7"
    file = newest / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    text = start("named", 2, resume_from_checkpoint=newest)
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and file.name in errors[0] and "Traceback" not in text
    assert tiny_runs.lines(tmp_path / "run") == expected
    text = start("latest", 0, resume_from_checkpoint="latest")
    assert f"{newest} cannot be used: {file.name} has " in text
    assert f"going on from {newest.with_name('checkpoint-6')}" in text
    assert tiny_runs.lines(tmp_path / "run") == expected
    assert tiny_runs.sound(tmp_path / "run") == [7, 6, 4]  # the damaged one is replaced
    for checkpoint in checkpoints(tmp_path / "run"):
        (checkpoint / "state.json").unlink()
    text = start("none", 2, resume_from_checkpoint="latest")
    assert "none of the 3 checkpoints" in text and "Traceback" not in text
