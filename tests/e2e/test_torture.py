"""Runs that are killed at random moments, again and again, lose nothing but their last steps.

``test_phases`` kills runs in phases that it chooses. Here launchers start them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from scalora_dist.checkpoint.manifest import LEFTOVER, checkpoints, is_sound, step_of
from tests.support import launched, tiny_models, tiny_runs
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

    victims: str
    step: int
    saving: bool


def leftovers(folder: Path) -> list[str]:
    """Checkpoints that are being written or deleted, or never were to the end."""
    return [path.name for path in folder.iterdir() if LEFTOVER.fullmatch(path.name)]


def attempt(
    engine: str, case: dict[str, Any], log: Path, chance: random.Random, whom: int | None
) -> Kill | None:
    """Start or go on, and kill one rank or all; None where the run came to its end first."""
    folder, before = case["output_dir"], newest(case["output_dir"])
    target = before + chance.randint(1, 4)
    aim_at_save = chance.random() < 0.4
    delay = chance.random() * (0.02 if aim_at_save else 0.3)
    begun = int(time.time() * 1e9)

    def reached() -> bool:
        # The file of the attempt before stands until this one has gone back to its checkpoint.
        try:
            fresh = (folder / "metrics.jsonl").stat().st_mtime_ns > begun
        except FileNotFoundError:  # a new start deletes it
            fresh = False
        return fresh and launched.last_step(folder) >= target

    with launched.Launched(engine, case, log) as run:
        if not run.wait_for(reached):
            assert run.process.returncode == 0, run.text()
            return None
        victims = run.everyone() if whom is None else [run.ranks()[whom]]
        if aim_at_save and not run.wait_for(lambda: leftovers(folder), pause=0.0):
            assert run.process.returncode == 0, run.text()
            return None
        time.sleep(delay)
        run.kill(victims)
        status = run.wait()  # a launcher ends when one of its ranks has died
        if status == 0:
            return None
        if before:
            assert f"going on from {folder / f'checkpoint-{before}'}\n" in run.text()
    victim = "all" if whom is None else f"rank {whom}"
    return Kill(victim, launched.last_step(folder), bool(leftovers(folder)))


def newest(folder: Path) -> int:
    """The newest checkpoint's step, 0 for none; every folder of that name must be whole."""
    found = checkpoints(folder)
    assert all(is_sound(checkpoint) for checkpoint in found), found
    return step_of(found[0]) or 0 if found else 0


def torture(
    ranks: Ranks, task: Path, tmp_path: Path, engine: str, *, kills: int, steps: int, seed: int
) -> None:
    """Kill a run so many times; in the end it is the run that was left alone."""
    folder, chance = tmp_path / "run", random.Random(seed)
    save_steps = chance.choice([1, 2])
    case = tiny_runs.options(
        task,
        folder,
        engine,
        max_steps=steps,
        save_steps=save_steps,
        save_total_limit=2,
        eval_steps=7,
        resume_from_checkpoint="latest",
    )
    ranks.run(tiny_runs.train, {**case, "output_dir": tmp_path / "alone"})
    done: list[Kill] = []
    victims = [None, *range(ranks.size)] * kills
    while len(done) < kills:
        kill = attempt(engine, case, tmp_path / f"log{len(done)}", chance, victims[len(done)])
        assert kill is not None, f"{steps} steps are too few for {kills} kills: {done}"
        done.append(kill)
        print(f"{engine}: {kill}, newest checkpoint {newest(folder)}", flush=True)
        # The line of a step comes before its save, which the next save waits for.
        assert kill.step - 2 * save_steps <= newest(folder) <= kill.step
    with launched.Launched(engine, case, tmp_path / "log") as run:
        assert run.wait() == 0, run.text()
    assert tiny_runs.lines(folder) == tiny_runs.lines(tmp_path / "alone")
    assert not leftovers(folder)
    print(f"{engine}: {len(done)} kills, {sum(kill.saving for kill in done)} of them in a save")


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("engine", "size", "kills"), [("fsdp", 2, 2), ("zero3", 2, 2)])
def test_runs_killed_again_and_again_go_on(
    ranks: GetRanks, task: Path, tmp_path: Path, engine: str, size: int, kills: int
) -> None:
    """Four kills, of all ranks and of one."""
    torture(
        ranks(size), task, tmp_path, engine, kills=kills, steps=10 * kills + 10, seed=100 + kills
    )
