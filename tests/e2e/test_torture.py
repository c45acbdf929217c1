"""Runs that are killed at random moments, again and again, lose nothing but their last steps.

``test_phases`` kills runs in phases that it chooses. Here a launcher starts the first run.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from scalora_dist.checkpoint.manifest import LEFTOVER, checkpoints, is_sound, step_of
from tests.support import launched, tiny_models, tiny_runs
from tests.support.forked import Forked
from tests.support.launched import Launched
from tests.support.ranks import Ranks

GetRanks = Callable[[int], Ranks]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


class Kill(NamedTuple):
    """What happened to one attempt.

    Attributes:
        step: the last one whose line was written.
        saving: whether a checkpoint was being written.
    """

    victims: Sequence[int]
    step: int
    saving: bool


def leftovers(folder: Path) -> list[str]:
    """Checkpoints that are being written or deleted, or never were to the end."""
    return [path.name for path in folder.iterdir() if LEFTOVER.fullmatch(path.name)]


def killer(run: Launched | Forked, whom: Sequence[int]) -> Callable[[], None]:
    """What kills these ranks. To find those of a launcher takes some time, which is spent here."""
    if isinstance(run, Forked):
        return lambda: run.send(signal.SIGKILL, whom)
    processes = run.ranks()
    return lambda: run.kill([processes[rank] for rank in whom])


def failed(run: Launched | Forked) -> bool:
    """Wait for the run's end. It comes, also for ranks whose peer was killed."""
    return any(run.wait()) if isinstance(run, Forked) else run.wait() != 0


def attempt(
    run: Launched | Forked,
    folder: Path,
    before: int,
    chance: random.Random,
    whom: Sequence[int],
    aim_at_save: bool,
) -> Kill | None:
    """Kill some ranks of a run that has started; None where it came to its end first.

    Args:
        before: the step of the checkpoint that it goes on from, 0 for none.
    """
    target = before + chance.randint(1, 3)
    delay = chance.random() * (0.02 if aim_at_save else 0.3)
    begun = int(time.time() * 1e9)

    def reached() -> bool:
        # The file of the attempt before stands until this one has gone back to its checkpoint.
        try:
            fresh = (folder / "metrics.jsonl").stat().st_mtime_ns > begun
        except FileNotFoundError:  # a new start deletes it
            fresh = False
        return fresh and launched.last_step(folder) >= target

    if not run.wait_for(reached):
        assert not failed(run), run.text()
        return None
    kill = killer(run, whom)
    if aim_at_save and not run.wait_for(lambda: leftovers(folder)):
        assert not failed(run), run.text()
        return None
    time.sleep(delay)
    kill()
    if not failed(run):
        return None
    if before:
        assert f"going on from {folder / f'checkpoint-{before}'}\n" in run.text()
    return Kill(whom, launched.last_step(folder), bool(leftovers(folder)))


def newest(folder: Path) -> int:
    """The newest checkpoint's step, 0 for none; every folder of that name must be whole."""
    found = checkpoints(folder)
    assert all(is_sound(checkpoint) for checkpoint in found), found
    return step_of(found[0]) or 0 if found else 0


@pytest.mark.heavy
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_runs_killed_again_and_again_go_on(
    ranks: GetRanks, task: Path, tmp_path: Path, engine: str
) -> None:
    """Four kills, of all ranks and of each. In the end it is the run that was left alone."""
    folder, chance = tmp_path / "run", random.Random(102)
    save_steps = chance.choice([1, 2])
    case = tiny_runs.options(
        task,
        folder,
        engine,
        max_steps=16,
        save_steps=save_steps,
        save_total_limit=2,
        eval_steps=7,
        resume_from_checkpoint="latest",
    )
    ranks(2).run(tiny_runs.train, {**case, "output_dir": tmp_path / "alone"})
    done: list[Kill] = []
    for whom, aim_at_save in (([0], True), ([0, 1], True), ([0], False), ([1], True)):
        log = tmp_path / f"log{len(done)}"
        before = newest(folder) if done else 0
        with Forked(2, case, log) if done else Launched(engine, case, log) as run:
            kill = attempt(run, folder, before, chance, whom, aim_at_save)
        assert kill is not None, f"{case['max_steps']} steps are too few: {done}"
        done.append(kill)
        print(f"{engine}: {kill}, newest checkpoint {newest(folder)}", flush=True)
        # The line of a step comes before its save, which the next save waits for.
        assert kill.step - 2 * save_steps <= newest(folder) <= kill.step
    with Forked(2, case, tmp_path / "log") as run:
        assert not failed(run), run.text()
    assert tiny_runs.lines(folder) == tiny_runs.lines(tmp_path / "alone")
    assert not leftovers(folder)
    print(f"{engine}: {len(done)} kills, {sum(kill.saving for kill in done)} of them in a save")
