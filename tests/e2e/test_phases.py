"""A run that is killed or asked to stop in any phase leaves in the end what it would have left."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from scalora_dist.checkpoint.manifest import checkpoints
from scalora_dist.distributed.stop_signals import PREEMPTED
from scalora_dist.distributed.world import World
from scalora_dist.errors import Preempted
from scalora_dist.training.phases import FILE
from scalora_dist.training.trainer import Trainer
from tests.support import runs, tiny_models, tiny_runs
from tests.support.forked import Forked
from tests.support.ranks import Ranks

GetRanks = Callable[[int], Ranks]

STEPS = 4
# {phase to stop: the last finished phase meanwhile}
AT_THE_END = {"evaluation": "training", "adapter": "evaluation", "model": "adapter"}
MANY = 400  # old checkpoints, so that moving them takes some time


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def finished(ranks: GetRanks, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run in one process."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    ranks(1).run(tiny_runs.train, options(task, folder, "local"))
    return folder


def options(task: Path, folder: Path, engine: str, **others: Any) -> dict[str, Any]:
    """A run with all phases; the ranks of updates and an approximation make them last longer."""
    return tiny_runs.options(
        task,
        folder,
        engine,
        max_steps=STEPS,
        save_steps=2,
        eval_steps=2,
        update_rank_layers=14,
        save_model=True,
        adapter_rank=4,
        **others,
    )


def outputs(folder: Path) -> dict[str, Any]:
    """What a run leaves, without timings: {file: its checksum, or its content without timings}."""
    found: dict[str, Any] = {"metrics.jsonl": tiny_runs.lines(folder)}
    summary = tiny_runs.timeless(json.loads((folder / "summary.json").read_text()))
    found["summary.json"] = {k: v for k, v in summary.items() if k != "output_dir"}
    for pattern in ("adapter/*", "model/*", f"checkpoint-{STEPS}/*.safetensors"):
        files = list(folder.glob(pattern))
        assert files, pattern
        for file in files:
            name = str(file.relative_to(folder))
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def check_whole(folder: Path, alone: Path) -> None:
    """Nothing is missing, nothing is left over, and all is as in the run that was left alone."""
    assert outputs(folder) == outputs(alone)
    assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()}
    assert phase(folder) == "upload"


def phase(folder: Path) -> Any:
    """The last finished phase; "" without phase.json."""
    try:
        return json.loads((folder / FILE).read_bytes())["finished"]
    except FileNotFoundError:
        return ""


class Victim:
    """A run that is killed again and again in phases that the test chooses."""

    def __init__(self, size: int, case: dict[str, Any], chance: random.Random) -> None:
        self.size = size
        self.case = case
        self.folder: Path = case["output_dir"]
        self.chance = chance
        self.log = self.folder.with_name("log")
        self.folder.parent.mkdir(exist_ok=True)

    def start(self, **others: Any) -> Forked:
        self.log.unlink(missing_ok=True)
        return Forked(self.size, self.case | others, self.log)

    def kill(self, aim: str, whom: Sequence[int], **others: Any) -> None:
        """Start, and kill ``whom`` in phase ``aim``. Starts anew where the phase was missed."""
        if aim == "first save":  # a save may have come to its end after a kill
            for checkpoint in self.folder.glob("checkpoint-[1-4]"):
                shutil.rmtree(checkpoint)
        before = self.folder.with_name("before")
        for _ in range(12):
            shutil.rmtree(before, ignore_errors=True)
            if self.folder.exists():
                shutil.copytree(self.folder, before)
            with self.start(**others) as run:
                reached = run.wait_for(lambda: self._is_in(aim, run))
                time.sleep(self.chance.random() * (1.0 if aim == "loading" else 0.01))
                run.send(signal.SIGKILL, whom)
                hit = reached and self._is_in(aim, run) and any(run.wait())
            if hit:
                return
            shutil.rmtree(self.folder, ignore_errors=True)
            if before.exists():
                shutil.copytree(before, self.folder)
        raise AssertionError(f"never killed in {aim}: {run.text()}")

    def signal(self, aim: str, whom: Sequence[int]) -> bool:
        """Start, and ask ``whom`` to stop in phase ``aim``. False: the run has come to its end."""
        with self.start() as run:
            reached = run.wait_for(lambda: self._is_in(aim, run))
            time.sleep(self.chance.random() * (0.5 if aim == "loading" else 0.01))
            run.send(signal.SIGTERM, whom)
            statuses = run.wait()
            assert set(statuses) == {Preempted.status if any(statuses) else 0}, run.text()
            assert reached or not any(statuses)
            assert "Traceback" not in run.text()
            assert run.text().count("stopped by") == any(statuses)
        return any(statuses)

    def _is_in(self, aim: str, run: Forked) -> bool:
        if aim == "loading":
            return phase(self.folder) in ("", None) and "training:" not in run.text()
        if aim == "overwriting":
            return phase(self.folder) is None
        if aim == "first save":
            return not checkpoints(self.folder) and any(self.folder.glob("*.partial/rank-*"))
        resumed = phase(self.folder) == AT_THE_END[aim]
        return resumed and "training:" in run.text()  # the bar, after loading


def old_run(folder: Path) -> None:
    """The folder of a finished run, whose checkpoints are not this run's."""
    for name in ("adapter", "model", *(f"checkpoint-{n}" for n in range(1000, 1000 + MANY))):
        (folder / name).mkdir(parents=True)
        (folder / name / "old").write_text(name)
    (folder / "summary.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')


def torture(
    ranks: Ranks, task: Path, tmp_path: Path, engine: str, aims: Sequence[str], seed: int
) -> None:
    """Kill one run in all ``aims``, in this order, then let it end."""
    alone, folder = tmp_path / "alone", tmp_path / "killed" / "run"
    ranks.run(tiny_runs.train, options(task, alone, engine))
    victim = Victim(ranks.size, options(task, folder, engine), random.Random(seed))
    old_run(folder)
    everyone = range(ranks.size)
    for i, aim in enumerate(aims):
        resume: dict[str, Any] = {"resume_from_checkpoint": "latest"}
        if aim == "overwriting" and i == 0:  # latest would look at the old run's checkpoints
            resume = {}
        whom = [everyone, *([rank] for rank in everyone)][i % (ranks.size + 1)]
        victim.kill(aim, whom, overwrite_output_dir=True, **resume)
        print(f"{engine}: killed {whom} in {aim}", flush=True)
        kept = [*folder.glob("checkpoint-1*"), *folder.glob("replaced-results/checkpoint-1*")]
        assert len(kept) == MANY
    with victim.start(resume_from_checkpoint="latest") as run:
        assert not any(run.wait()), run.text()
    check_whole(folder, alone)


def test_a_run_killed_in_three_phases(ranks: GetRanks, task: Path, tmp_path: Path) -> None:
    torture(ranks(1), task, tmp_path, "local", ["overwriting", "first save", "model"], seed=1)


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("engine", "times"), [("zero3", 3), ("fsdp", 2)])
def test_runs_killed_in_every_phase(
    ranks: GetRanks, task: Path, tmp_path: Path, engine: str, times: int
) -> None:
    """Of all ranks and of each in turn: three kills in each phase are all of them."""
    order = ["overwriting", "loading", "first save", *AT_THE_END]
    aims = [aim for aim in order for _ in range(times)]
    torture(ranks(2), task, tmp_path, engine, aims, seed=2)


# Signals.

MANY_SIGNALS = ["loading", "first save", *AT_THE_END]


def check_stopped_and_resumed(
    ranks: Ranks, task: Path, tmp_path: Path, engine: str, aims: Sequence[str]
) -> None:
    """Ask one run to stop in all ``aims``: 75 each time, and in the end nothing is missing."""
    alone, folder = tmp_path / "alone", tmp_path / "stopped" / "run"
    ranks.run(tiny_runs.train, options(task, alone, engine))
    case = options(task, folder, engine, resume_from_checkpoint="latest")
    victim = Victim(ranks.size, case, random.Random(5))
    whole = range(ranks.size)
    for i, aim in enumerate(aims):
        if victim.signal(aim, whole if i % 2 else whole[-1:]):
            assert (folder / PREEMPTED).exists()
    with victim.start() as run:
        assert not any(run.wait()), run.text()
    for checkpoint in checkpoints(folder):  # a signal between two steps saves there
        if checkpoint.name in ("checkpoint-1", "checkpoint-3"):
            shutil.rmtree(checkpoint)
    check_whole(folder, alone)


def test_a_signal_in_three_phases(ranks: GetRanks, task: Path, tmp_path: Path) -> None:
    aims = ["loading", "evaluation", "model"]
    check_stopped_and_resumed(ranks(1), task, tmp_path, "local", aims)


@pytest.mark.heavy
@pytest.mark.parametrize(("size", "engine"), [(1, "local"), (2, "zero3"), (2, "fsdp")])
def test_a_signal_in_any_phase(
    ranks: GetRanks, task: Path, tmp_path: Path, size: int, engine: str
) -> None:
    """To the last rank in one round and to all in the next; with one rank both are the same."""
    check_stopped_and_resumed(ranks(size), task, tmp_path, engine, min(size, 2) * MANY_SIGNALS)


def asked_while_evaluating(world: World, case: dict[str, Any], rank: int) -> str:
    """Train, and ask ``rank`` to stop when it begins the evaluation between two steps."""

    class Asked(Trainer):
        def _evaluate(self, log: Any, step: int, *others: Any, **named: Any) -> Any:
            if step == 2 and self.world.rank == rank:
                os.kill(os.getpid(), signal.SIGTERM)
            return super()._evaluate(log, step, *others, **named)

    with pytest.raises(Preempted) as stop:
        runs.make(world, case, Asked).run()
    return str(stop.value)


@pytest.mark.parametrize(
    ("size", "engine"),
    [(1, "local"), (2, "fsdp"), pytest.param(2, "zero3", marks=pytest.mark.heavy)],
)
def test_a_signal_cuts_an_evaluation_short(
    ranks: GetRanks, task: Path, tmp_path: Path, size: int, engine: str
) -> None:
    """The step before it is saved, although no save was due; the resumed run evaluates anew."""
    others = {"save_steps": 0, "resume_from_checkpoint": "latest"}
    case = options(task, tmp_path / "run", engine) | others
    for sentence in ranks(size).run(asked_while_evaluating, case, size - 1):
        assert "after step 2" in sentence
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert len(tiny_runs.evaluations(tmp_path / "run")) == 1
    assert [first for first, *_ in ranks(size).run(tiny_runs.train, case)] == [2] * size
    alone = case | {"output_dir": tmp_path / "alone"}
    ranks(size).run(tiny_runs.train, alone)
    assert len(tiny_runs.evaluations(tmp_path / "run")) == 3
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    check_whole(tmp_path / "run", tmp_path / "alone")


# A run that is finished.


def test_a_finished_run_started_again_changes_nothing(
    ranks: GetRanks, task: Path, tmp_path: Path
) -> None:
    """A requeued job may have come to its end. Without its model, only that is written again."""
    case = options(task, tmp_path, "local", resume_from_checkpoint="latest")
    ranks(1).run(tiny_runs.train, case)
    expected = outputs(tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/model*")}
    summary = (tmp_path / "summary.json").read_bytes()
    for name in ("checkpoint-9.partial", "checkpoint-1.old", "model.partial"):  # of a killed run
        (tmp_path / name).mkdir()
    ranks(1).run(tiny_runs.train, case)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert (tmp_path / "summary.json").read_bytes() == summary
    assert not [*tmp_path.glob("*.partial"), *tmp_path.glob("*.old")]
    (tmp_path / "model" / "config.json").unlink()
    ranks(1).run(tiny_runs.train, case)
    assert outputs(tmp_path) == expected


def drop(file: Path, *keys: str) -> None:
    """Remove a value from a JSON file."""
    content = json.loads(file.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    file.write_text(json.dumps(content))


HARMS: dict[str, Callable[[Path], object]] = {
    "no phase.json": lambda folder: (folder / FILE).unlink(),
    "empty": lambda folder: (folder / FILE).write_text(""),
    "deep": lambda folder: (folder / FILE).write_text("[" * 100_000),
    "a list": lambda folder: (folder / FILE).write_text("[]"),
    "no step": lambda folder: drop(folder / FILE, "step"),
    "no evaluation": lambda folder: drop(folder / FILE, "found", "after"),
    "summary.json": lambda folder: (folder / "summary.json").write_text("garbage"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_damaged_at_the_end_is_written_again(
    ranks: GetRanks, task: Path, tmp_path: Path, finished: Path, harm: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    HARMS[harm](folder)
    case = options(task, folder, "local", resume_from_checkpoint="latest")
    assert ranks(1).run(tiny_runs.train, case)[0][0] == STEPS
    check_whole(folder, finished)


def test_a_refused_run_leaves_nothing(task: Path, tmp_path: Path) -> None:
    """Not even the mark of a preempted run, though a launcher then ends the other ranks."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").touch()
    with Forked(2, options(task, folder, "fsdp"), tmp_path / "log") as run:
        assert run.wait()[0] == 2, run.text()
    assert "is not empty" in run.text()
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_a_longer_run_goes_on_from_a_finished_one(
    ranks: GetRanks, task: Path, tmp_path: Path
) -> None:
    """Its results replace the shorter run's, also those that it does not write itself."""
    case = options(task, tmp_path / "run", "local", lr_scheduler_type="constant")
    ranks(1).run(tiny_runs.train, case)
    longer = {"max_steps": STEPS + 2, "resume_from_checkpoint": "latest", "save_model": False}
    ranks(1).run(tiny_runs.train, case | longer)
    alone = case | longer | {"output_dir": tmp_path / "alone"}
    ranks(1).run(tiny_runs.train, alone)
    left = [{path.name for path in (tmp_path / run).iterdir()} for run in ("run", "alone")]
    assert left[0] == left[1] and "model" not in left[0]
    losses = [runs.losses(tmp_path / run) for run in ("run", "alone")]
    assert losses[0] == losses[1]
