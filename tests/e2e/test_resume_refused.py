"""What a resume refuses, and what it takes with a warning: other options, data, bases, versions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalora_dist.checkpoint.manifest import MANIFEST, STATE, read_state, write_synced
from tests.support import tiny_models, tiny_runs
from tests.support.ranks import Ranks
from tests.support.workers import older

GetRanks = Callable[[int], Ranks]
ResumedFrom = Callable[[int, str], Path]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


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
    case = tiny_runs.steady(task, tmp_path / "run", "local", **others)
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
        case = tiny_runs.steady(task, run, "local", **others)
        first, _, warned = ranks(1).run(tiny_runs.train, case)[0]
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
    ranks(1).run(tiny_runs.train, tiny_runs.steady(mine, run, "local", **options))
    before = tiny_runs.lines(run)
    shutil.rmtree(run / "checkpoint-2")
    change(mine)
    options["resume_from_checkpoint"] = "latest"
    for sentence, status, _ in ranks(2).run(
        tiny_runs.refusal, tiny_runs.steady(mine, run, "fsdp", **options)
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
    case = tiny_runs.steady(task, tmp_path / "run", "local", resume_from_checkpoint=folder)
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
    case = tiny_runs.steady(task, tmp_path / "run", "zero3", **others)
    for sentence, status, _ in ranks(2).run(tiny_runs.refusal, case):
        assert status == 2
        assert "--model_name_or_path" in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("size", "engine"),
    [
        (1, "local"),
        pytest.param(2, "zero3", marks=pytest.mark.heavy),
        pytest.param(2, "fsdp", marks=pytest.mark.heavy),
    ],
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
    case = tiny_runs.steady(task, tmp_path / "run", "zero3", **others)
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
    case = tiny_runs.steady(task, tmp_path, "local", **others)
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
    case = tiny_runs.steady(task, folder, "local", resume_from_checkpoint="latest", max_steps=7)
    sentence, status, _ = ranks(1).run(tiny_runs.refusal, case)[0]
    assert status == 2 and "\n" not in sentence
    assert f"{folder / 'checkpoint-8'} is beyond this run's 7 step(s)" in sentence
    assert {path.name for path in folder.iterdir()} == before


def test_an_older_checkpoint_among_newer_ones_is_refused(
    ranks: GetRanks, task: Path, saved: ResumedFrom
) -> None:
    folder = saved(2, "fsdp")
    before = tiny_runs.lines(folder)
    case = tiny_runs.steady(
        task, folder, "local", resume_from_checkpoint=folder / "checkpoint-4", max_steps=9
    )
    sentence, status, _ = ranks(1).run(tiny_runs.refusal, case)[0]
    assert status == 2
    assert "checkpoint-8" in sentence
    assert tiny_runs.lines(folder) == before
