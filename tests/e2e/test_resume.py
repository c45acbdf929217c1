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

from scalora_dist.checkpoint.manifest import MANIFEST, STATE, read_state, write_synced
from tests.support import runs, tiny_models, tiny_runs
from tests.support.ranks import Ranks
from tests.support.workers import older

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


@pytest.fixture(scope="module")
def saved(ranks: GetRanks, task: Path, tmp_path_factory: pytest.TempPathFactory) -> ResumedFrom:
    """``saved(size, engine)``: the folder of a run of 8 steps with a checkpoint at step 4."""
    made: dict[tuple[int, str], Path] = {}

    def get(size: int, engine: str) -> Path:
        if (size, engine) not in made:
            folder = made[size, engine] = tmp_path_factory.mktemp("saved") / "run"
            ranks(size).run(tiny_runs.train, steady(task, folder, engine))
        return made[size, engine]

    return get


def steady(task: Path, folder: Path, engine: str, **others: Any) -> dict[str, Any]:
    """No dropout, which other ranks draw otherwise."""
    return tiny_runs.options(
        task,
        folder,
        engine,
        **{"max_steps": 8, "save_steps": 4, "eval_steps": 4, "lora_dropout": 0.0, **others},
    )


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
    case = steady(task, tmp_path, engine, resume_from_checkpoint=folder / "checkpoint-4")
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
    case = steady(task, folder, "local", resume_from_checkpoint="latest")
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
    case = steady(task, folder, "local", resume_from_checkpoint="latest")
    _, summary, _ = ranks(1).run(tiny_runs.train, case)[0]
    assert summary["steps"] == 8 and summary["loss_first"] == runs.losses(saved(1, "local"))[0]


REFUSED: dict[str, Any] = {
    "rank": 3,
    "seed": 7,
    "train_batch_size": 6,
    "max_length": 20,
    "method": "lora",
    "bf16": True,
}


@pytest.mark.parametrize("option", REFUSED)
def test_another_run_is_refused(
    ranks: GetRanks, task: Path, saved: ResumedFrom, tmp_path: Path, option: str
) -> None:
    checkpoint = saved(2, "fsdp") / "checkpoint-4"
    others = {"resume_from_checkpoint": checkpoint, option: REFUSED[option]}
    case = steady(task, tmp_path / "run", "local", **others)
    sentence, status, _ = ranks(1).run(tiny_runs.refusal, case)[0]
    assert status == 2
    assert f"set --{option} " in sentence and "\n" not in sentence
    assert not (tmp_path / "run").exists()


def test_moved_data_are_the_same_data(
    ranks: GetRanks, task: Path, saved: ResumedFrom, tmp_path: Path
) -> None:
    """A copy in another folder, and a link to it: the resumed run is the same bit for bit."""
    folder, copy, link = saved(1, "local"), tmp_path / "copy.jsonl", tmp_path / "link.jsonl"
    copy.write_bytes((task / "texts.jsonl").read_bytes())
    link.symlink_to(copy)
    for path in (copy, link):
        run = tmp_path / path.stem
        others = {"resume_from_checkpoint": folder / "checkpoint-4", "dataset": path}
        first, _, warned = ranks(1).run(tiny_runs.train, steady(task, run, "local", **others))[0]
        assert first == 4
        assert tiny_runs.lines(run) == tiny_runs.lines(folder)
        (warning,) = [line for line in warned if "--dataset " in line]
        assert str(path) in warning


def reverse(folder: Path) -> None:
    """The same examples in another order."""
    lines = (folder / "texts.jsonl").read_text().splitlines(keepends=True)
    (folder / "texts.jsonl").write_text("".join(reversed(lines)))


def append(folder: Path) -> None:
    with (folder / "texts.jsonl").open("a") as file:
        file.write(json.dumps({"text": "abc abc"}) + "\n")


def write_chat(folder: Path, answer: str = "b", end: str = "") -> None:
    """A chat to evaluate on, and a chat template that ends a message with ``end``."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    template = f"{{% for m in messages %}}{{{{ m.role + m.content }}}}{end}{{% endfor %}}"
    (folder / "chat_template.jinja").write_text(template)


def change_evaluation(folder: Path) -> None:
    write_chat(folder, answer="c")


def change_template(folder: Path) -> None:
    write_chat(folder, end="|")


def change_tokenizer(folder: Path) -> None:
    """Other ids for the same texts: the letters a and b change places."""
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text())
    vocabulary = saved["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(saved))


@pytest.mark.parametrize(
    ("change", "held_out"),
    [
        (reverse, True),
        (append, True),
        (change_tokenizer, True),
        (change_evaluation, False),
        (change_template, False),
    ],
)
def test_data_that_changed_under_their_name_are_refused(
    ranks: GetRanks, task: Path, tmp_path: Path, change: Callable[[Path], None], held_out: bool
) -> None:
    mine, run = tmp_path / "mine", tmp_path / "run"
    shutil.copytree(task, mine)
    write_chat(mine)
    options: dict[str, Any] = {"max_steps": 2, "save_steps": 1}
    if not held_out:
        options["eval_dataset"] = mine / "chat.jsonl"
    ranks(1).run(tiny_runs.train, steady(mine, run, "local", **options))
    before = tiny_runs.lines(run)
    shutil.rmtree(run / "checkpoint-2")
    change(mine)
    options["resume_from_checkpoint"] = "latest"
    for sentence, status, _ in ranks(2).run(
        tiny_runs.refusal, steady(mine, run, "fsdp", **options)
    ):
        assert status == 2
        assert "other data" in sentence and "bring back" in sentence and "\n" not in sentence
        assert "--" not in sentence  # no option differs
    assert tiny_runs.lines(run) == before


def test_another_format_is_refused(
    ranks: GetRanks, task: Path, saved: ResumedFrom, tmp_path: Path
) -> None:
    """An older checkpoint, which has no checksum of its data."""
    folder = tmp_path / "older" / "checkpoint-4"
    shutil.copytree(saved(1, "local") / "checkpoint-4", folder)
    state = read_state(folder)
    state["format"] = 1
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][STATE] = write_synced(folder / STATE, json.dumps(state).encode())
    (folder / MANIFEST).write_text(json.dumps(manifest))
    case = steady(task, tmp_path / "run", "local", resume_from_checkpoint=folder)
    sentence, status, _ = ranks(1).run(tiny_runs.refusal, case)[0]
    assert status == 2
    assert f"{folder} has format 1" in sentence and "with the version that wrote it" in sentence


def test_another_base_model_is_refused(
    ranks: GetRanks, task: Path, saved: ResumedFrom, tmp_path: Path
) -> None:
    """One number of one frozen weight is another; every rank says so."""
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(task, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 3] += 1e-3
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    others = {
        "resume_from_checkpoint": saved(2, "fsdp") / "checkpoint-4",
        "model_name_or_path": model,
    }
    case = steady(task, tmp_path / "run", "zero3", **others)
    for sentence, status, _ in ranks(2).run(tiny_runs.refusal, case):
        assert status == 2
        assert "--model_name_or_path" in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("size", "engine"),
    [(1, "local"), *(pytest.param(*x, marks=pytest.mark.heavy) for x in ENGINES[2:4])],
)
def test_a_checkpoint_with_other_monitored_layers_is_refused(
    ranks: GetRanks, task: Path, tmp_path: Path, size: int, engine: str
) -> None:
    """As an older version left it, which followed other layers under the same options."""
    others = {"rank_monitor_steps": 2, "rank_monitor_layers": 2, "max_steps": 3, "save_steps": 2}
    case = tiny_runs.options(task, tmp_path / "run", engine, **others)
    ranks(size).run(older.train, case)
    for sentence, status, _ in ranks(size).run(
        tiny_runs.refusal, {**case, "resume_from_checkpoint": "latest"}
    ):
        assert status == 2 and "\n" not in sentence
        assert "checkpoint-3 was saved by a version" in sentence and ".sketch." in sentence


def test_a_checkpoint_with_more_layers_is_refused(ranks: GetRanks, tmp_path: Path) -> None:
    """It holds factors of Mamba's x_proj, which this version leaves out."""
    (tmp_path / "mamba").mkdir()
    tiny_models.save_tiny_mamba(tmp_path / "mamba")
    others = {"method": "lora", "rank": 1, "max_steps": 3, "save_steps": 2}
    case = tiny_runs.options(tmp_path / "mamba", tmp_path / "run", "local", **others)
    ranks(1).run(older.train, case)
    ((sentence, status, _),) = ranks(1).run(
        tiny_runs.refusal, {**case, "resume_from_checkpoint": "latest"}
    )
    assert status == 2 and "\n" not in sentence
    assert "checkpoint-3 was saved by a version" in sentence and "_proj.A is in it" in sentence


def test_ranks_that_do_not_divide_the_batch_are_refused(
    ranks: GetRanks, task: Path, saved: ResumedFrom, tmp_path: Path
) -> None:
    others = {
        "resume_from_checkpoint": saved(2, "fsdp") / "checkpoint-4",
        "per_device_train_batch_size": 5,
    }
    case = steady(task, tmp_path / "run", "zero3", **others)
    sentence, status, _ = ranks(2).run(tiny_runs.refusal, case)[0]
    assert status == 2
    assert "--train_batch_size 12" in sentence and "2 rank(s)" in sentence and "\n" not in sentence


def test_another_learning_rate_is_taken_with_a_warning(
    ranks: GetRanks, task: Path, saved: ResumedFrom, tmp_path: Path
) -> None:
    others = {
        "resume_from_checkpoint": saved(2, "fsdp") / "checkpoint-4",
        "learning_rate": 5e-4,
    }
    case = steady(task, tmp_path, "local", **others)
    _, _, warned = ranks(1).run(tiny_runs.train, case)[0]
    assert [line for line in warned if "--learning_rate" in line]
    rates = [line["learning_rate"] for line in tiny_runs.lines(tmp_path) if "loss" in line]
    linear = [1 - step / 8 for step in range(8)]
    expected = [1e-3 * part for part in linear[:4]] + [5e-4 * part for part in linear[4:]]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_a_checkpoint_beyond_the_end_is_refused(
    ranks: GetRanks, task: Path, saved: ResumedFrom
) -> None:
    """Otherwise its weights would be taken for those of an earlier step."""
    folder = saved(2, "fsdp")
    before = {path.name for path in folder.iterdir()}
    case = steady(task, folder, "local", resume_from_checkpoint="latest", max_steps=7)
    sentence, status, _ = ranks(1).run(tiny_runs.refusal, case)[0]
    assert status == 2 and "\n" not in sentence
    assert f"{folder / 'checkpoint-8'} is beyond this run's 7 step(s)" in sentence
    assert {path.name for path in folder.iterdir()} == before


def test_an_older_checkpoint_among_newer_ones_is_refused(
    ranks: GetRanks, task: Path, saved: ResumedFrom
) -> None:
    folder = saved(2, "fsdp")
    before = tiny_runs.lines(folder)
    case = steady(
        task, folder, "local", resume_from_checkpoint=folder / "checkpoint-4", max_steps=9
    )
    sentence, status, _ = ranks(1).run(tiny_runs.refusal, case)[0]
    assert status == 2
    assert "checkpoint-8" in sentence
    assert tiny_runs.lines(folder) == before
