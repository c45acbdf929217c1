"""A run that goes on from a checkpoint is the run that was never interrupted."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import runs, tiny_models, tiny_runs
from tests.support.ranks import Ranks

GetRanks = Callable[[int], Ranks]

STEPS = 7
ENGINES = [(2, "zero1"), (2, "zero2"), (2, "zero3"), (2, "fsdp"), (1, "local")]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


def check_goes_on(ranks: Ranks, work: Any, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Run, delete the newest checkpoints, resume: nothing differs. The lines of the first run."""
    folder = case["output_dir"]
    ranks.run(work, case)
    expected = tiny_runs.left(folder)
    saved = {"checkpoint-3", "checkpoint-6", f"checkpoint-{STEPS}"}
    assert {path.name for path in folder.glob("checkpoint-*")} == saved
    shutil.rmtree(folder / "checkpoint-6")
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    answers = ranks.run(work, {**case, "resume_from_checkpoint": "latest"})
    assert [first for first, _, _ in answers] == [3] * ranks.size
    assert tiny_runs.left(folder) == expected
    assert {path.name for path in folder.glob("checkpoint-*")} == saved
    assert not [*folder.glob("*.partial"), *folder.glob("replaced*")]
    return expected[0]


# The stages whose shards are alike take turns.
SOMETIMES = (("zero1", "bf16"), ("zero2", "fp32"), ("zero3", "bf16"))


@pytest.mark.floors
@pytest.mark.parametrize(
    ("size", "engine", "dtype"),
    [
        pytest.param(
            *(size, engine, dtype), marks=pytest.mark.heavy if (engine, dtype) in SOMETIMES else []
        )
        for (size, engine), dtype in itertools.product(ENGINES, ("fp32", "bf16"))
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    ranks: GetRanks, task: Path, tmp_path: Path, size: int, engine: str, dtype: str
) -> None:
    """Metrics to the last digit, the update's rank, and the model, with dropout and merges."""
    case = tiny_runs.options(
        task,
        tmp_path / "run",
        engine,
        max_steps=STEPS,
        save_steps=3,
        eval_steps=2,
        warmup_ratio=0.5,
        update_rank_layers=2,
        save_model=True,
        bf16=True if dtype == "bf16" else None,
    )
    lines = check_goes_on(ranks(size), tiny_runs.train, case)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    # Otherwise nothing was merged, and the equality would say little.
    assert all(sum(line["rescale"].values()) > line["rescale"]["skipped"] for line in steps)
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4, 6, 7]


@pytest.mark.parametrize("stage", ["zero2", pytest.param("zero3", marks=pytest.mark.heavy)])
def test_the_loss_scale_goes_on(ranks: GetRanks, task: Path, tmp_path: Path, stage: str) -> None:
    """fp16: the scale grows every second good step, also over the checkpoint at step 3."""
    settings = {"loss_scale_window": 2, "initial_scale_power": 5, "hysteresis": 1}
    case = tiny_runs.options(
        task,
        tmp_path / "run",
        stage,
        max_steps=STEPS,
        save_steps=3,
        save_model=True,
        **tiny_runs.fp16_options(stage, tmp_path, **settings),
    )
    lines = check_goes_on(ranks(2), tiny_runs.train_fp16, case)
    scales = [line["loss_scale"] for line in lines if "loss" in line]
    # What the checkpoint holds is another scale than the first, and half-way to the next.
    assert scales[0] < scales[3] == scales[4] < scales[5], scales


def test_a_run_goes_on_elsewhere(ranks: GetRanks, task: Path, tmp_path: Path) -> None:
    """A checkpoint named by its path: the other folder gets the lines before it too."""
    case = tiny_runs.options(task, tmp_path / "a", "local", max_steps=5, save_steps=2, eval_steps=2)
    ranks(1).run(tiny_runs.train, case)
    there = {
        **case,
        "output_dir": tmp_path / "b",
        "resume_from_checkpoint": tmp_path / "a" / "checkpoint-2",
    }
    assert ranks(1).run(tiny_runs.train, there)[0][0] == 2
    assert tiny_runs.lines(tmp_path / "b") == tiny_runs.lines(tmp_path / "a")


RESHARDED = [
    # saved on, resumed on
    ((2, "zero3"), (3, "zero3")),
    ((2, "zero3"), (3, "fsdp")),
    ((2, "fsdp"), (1, "local")),
    ((2, "zero2"), (3, "zero1")),
    *(
        pytest.param(*case, marks=pytest.mark.heavy)
        for case in (
            ((2, "zero3"), (1, "zero3")),
            ((2, "zero3"), (4, "zero3")),
            ((2, "fsdp"), (4, "zero3")),
            ((2, "zero2"), (1, "local")),
        )
    ),
]
ResumedFrom = Callable[[int, str], Path]


@pytest.mark.parametrize(("before", "after"), RESHARDED)
def test_other_ranks_and_engines_go_on(
    ranks: GetRanks,
    task: Path,
    saved: ResumedFrom,
    tmp_path: Path,
    before: tuple[int, str],
    after: tuple[int, str],
) -> None:
    folder, (size, engine) = saved(*before), after
    case = tiny_runs.steady(
        task,
        tmp_path,
        engine,
        per_device_train_batch_size=2 if size == 3 else 3,  # 3 ranks cannot share 12 by threes
        resume_from_checkpoint=folder / "checkpoint-4",
    )
    answers = ranks(size).run(tiny_runs.train, case)
    assert [first for first, _, _ in answers] == [4] * size
    ours, theirs = np.array(runs.losses(tmp_path)), np.array(runs.losses(folder))
    assert (ours[:4] == theirs[:4]).all()
    difference = np.abs(ours / theirs - 1)[4:].max()
    print(f"{before} → {after}: {difference:.1e}")
    assert len(ours) == len(theirs) == 8 and difference < 1e-5
    evaluated = [
        [line["eval_loss"] for line in tiny_runs.lines(run) if "eval_loss" in line]
        for run in (tmp_path, folder)
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)


def lose(file: Path) -> None:
    file.unlink()


def tear(file: Path) -> None:
    """Lines that are no JSON, have no step or another one, are not UTF-8, or are cut short."""
    lines = file.read_bytes().splitlines()
    odd = [b"[]", b"\xff\xfe", b'{"step": "3"}', b'{"step": 1e999}', b"[" * 99_999]
    lines[1:4] = [b'{"step": 1, "lo', *odd, lines[3]]
    file.write_bytes(b"\n".join(lines))


def empty(file: Path) -> None:
    file.write_text("")


@pytest.mark.parametrize("harm", [lose, tear, empty])
def test_damaged_metrics_do_not_end_a_resume(
    ranks: GetRanks, task: Path, saved: ResumedFrom, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    """What the run decides and sums up is in the checkpoint. Only lines are lost."""
    folder = tmp_path / "run"
    shutil.copytree(saved(1, "local"), folder)
    expected = tiny_runs.timeless(json.loads((folder / "summary.json").read_text()))
    lines = tiny_runs.lines(folder)
    shutil.rmtree(folder / "checkpoint-8")
    harm(folder / "metrics.jsonl")
    case = tiny_runs.steady(task, folder, "local", resume_from_checkpoint="latest")
    first, summary, warned = ranks(1).run(tiny_runs.train, case)[0]
    assert first == 4
    assert summary == expected | {"output_dir": str(folder)}
    assert [line for line in warned if "metrics.jsonl lacks" in line]
    after = [line for line in lines if line["step"] > 4]
    assert tiny_runs.lines(folder)[-len(after) :] == after


def test_a_finished_run_without_metrics_has_its_summary(
    ranks: GetRanks, task: Path, saved: ResumedFrom, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved(1, "local"), folder)
    for name in ("metrics.jsonl", "summary.json"):
        (folder / name).unlink()
    case = tiny_runs.steady(task, folder, "local", resume_from_checkpoint="latest")
    _, summary, _ = ranks(1).run(tiny_runs.train, case)[0]
    assert summary["steps"] == 8 and summary["loss_first"] == runs.losses(saved(1, "local"))[0]
