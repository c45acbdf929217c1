"""What a run may write over: nothing that it reads, and old results only when its own are whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scalora_dist.config.options import Options
from scalora_dist.config.parser import parse_options
from scalora_dist.errors import UserError
from scalora_dist.training.output_dir import (
    check_inputs,
    check_output_dir,
    discard_replaced,
    set_aside,
)
from tests.support.refusals import one_sentence


def options(folder: Path, **given: Path) -> Options:
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return parse_options(["--output_dir", str(folder), *words])


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    folder = tmp_path / "out"
    for name in ("adapter", "model", "checkpoint-4", "tensorboard", "replaced-results/model"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text(name)
    for name in ("summary.json", "metrics.jsonl", "phase.json"):
        (folder / name).write_text("{}\n")
    return folder


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def folder_of_links(folder: Path, file: Path) -> Path:
    """A folder whose only file is a link, like a snapshot in the hub's cache."""
    folder.mkdir()
    link(folder / file.name, file)
    return folder


def nested_links(folder: Path, file: Path) -> Path:
    folder_of_links(folder, file).rename(folder.with_name("inner"))
    folder.mkdir()
    folder.with_name("inner").rename(folder / "inner")
    return folder


def moved_away(out: Path, tmp: Path) -> Path:
    """The base lies elsewhere, and ``out/model`` is a link to it."""
    (out / "model").rename(tmp / "base")
    link(out / "model", tmp / "base")
    return tmp / "base"


READ: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {
    "the base": ("model_name_or_path", lambda out, tmp: out / "model"),
    "the base by another name": (
        "model_name_or_path",
        lambda out, tmp: out / ".." / "out" / "model",
    ),
    "a link to the base": (
        "model_name_or_path",
        lambda out, tmp: link(tmp / "base", out / "model"),
    ),
    "links to the base's files": (
        "model_name_or_path",
        lambda out, tmp: folder_of_links(tmp / "base", out / "model" / "file"),
    ),
    "a base that out/model links to": ("model_name_or_path", moved_away),
    "a base from the run before": (
        "model_name_or_path",
        lambda out, tmp: out / "replaced-results" / "model",
    ),
    "the adapter": ("adapter_name_or_path", lambda out, tmp: out / "adapter"),
    "data": ("dataset", lambda out, tmp: out / "metrics.jsonl"),
    "data through a link": (
        "dataset",
        lambda out, tmp: link(tmp / "data.jsonl", out / "metrics.jsonl"),
    ),
    "a folder that links to data": (
        "eval_dataset",
        lambda out, tmp: nested_links(tmp / "data", out / "metrics.jsonl"),
    ),
    "a folder of data around the results": ("dataset", lambda out, tmp: tmp),
    "evaluation data": ("eval_dataset", lambda out, tmp: out / "model" / "file"),
    "DeepSpeed's config": ("ds_config", lambda out, tmp: out / "summary.json"),
}


@pytest.mark.parametrize("case", READ)
def test_what_a_run_reads_is_not_replaced(finished: Path, tmp_path: Path, case: str) -> None:
    option, place = READ[case]
    path = place(finished, tmp_path)
    with pytest.raises(UserError) as error:
        check_inputs(finished, options(finished, **{option: path}), None)
    sentence = one_sentence(error)
    assert f"--{option} {path} and --output_dir {finished} share" in sentence


def test_a_link_to_a_checkpoint_of_the_folder(finished: Path, tmp_path: Path) -> None:
    checkpoint = link(tmp_path / "checkpoint-4", finished / "checkpoint-4")
    with pytest.raises(UserError, match="--resume_from_checkpoint"):
        check_inputs(finished, options(finished), checkpoint)


def test_other_places_are_fine(finished: Path, tmp_path: Path) -> None:
    """Beside the results, or around them where only the top folder's files are read."""
    (finished / "mine.jsonl").write_text("{}\n")
    (tmp_path / "data.csv").write_text("a\n")
    given = {
        "model_name_or_path": tmp_path,
        "dataset": finished / "mine.jsonl",
        "eval_dataset": tmp_path / "data.csv",
    }
    check_inputs(finished, options(finished, **given), tmp_path / "other" / "checkpoint-4")


def test_data_around_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    """Its metrics would be read as data by the next start."""
    new = tmp_path / "data" / "runs" / "1"
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=f"share {new}/"):
        check_inputs(new, options(new, dataset=tmp_path / "data"), None)
    assert not new.exists()


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_results_are_moved_aside_and_deleted_at_the_end(finished: Path) -> None:
    (finished / "mine.txt").write_text("the user's")
    before = names(finished)
    set_aside(finished)
    assert {path.name for path in finished.iterdir() if "replaced" not in path.name} == {
        "mine.txt",
        "phase.json",
    }
    contents = {path.read_text() for path in finished.rglob("file")}
    assert contents == {"adapter", "model", "checkpoint-4", "tensorboard", "replaced-results/model"}
    assert len(names(finished)) == len(before)
    after = names(finished)
    set_aside(finished)  # as after a kill
    assert names(finished) == after
    discard_replaced(finished)
    assert names(finished) == {"mine.txt", "phase.json"}


def test_a_move_cut_short_is_finished_by_the_next(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename, left = len(names(finished)), Path.rename, 2

    def dies(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        set_aside(finished)
    monkeypatch.setattr(Path, "rename", rename)
    set_aside(finished)
    assert len(names(finished)) == before
    assert not (finished / "model").exists() and not (finished / "checkpoint-4").exists()


def test_logs_alone_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "model.partial").mkdir()
    set_aside(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_keeps_its_checkpoints_and_logs(finished: Path) -> None:
    set_aside(finished, everything=False)
    left = {path.name for path in finished.iterdir()}
    assert left >= {"checkpoint-4", "metrics.jsonl", "tensorboard"}
    assert not left & {"model", "adapter", "summary.json"}


@pytest.mark.parametrize(
    ("content", "words", "allowed"),
    [
        ((), (), True),
        (("preempted",), (), True),  # stopped while it was loading
        (("metrics.jsonl", "phase.json"), ("--resume_from_checkpoint", "latest"), True),
        (("metrics.jsonl",), (), False),
        (("metrics.jsonl", "adapter"), ("--resume_from_checkpoint", "latest"), True),
        (("metrics.jsonl", "summary.json"), ("--resume_from_checkpoint", "latest"), False),
        (("mine.txt",), ("--resume_from_checkpoint", "latest"), False),
        (("summary.json", "mine.txt"), ("--overwrite_output_dir",), True),
    ],
)
def test_which_folders_a_run_may_write_to(
    tmp_path: Path, content: tuple[str, ...], words: tuple[str, ...], allowed: bool
) -> None:
    for name in content:
        (tmp_path / name).touch()
    train = parse_options(["--output_dir", str(tmp_path), *words]).train
    if allowed:
        check_output_dir(tmp_path, train)
        return
    with pytest.raises(UserError) as error:
        check_output_dir(tmp_path, train)
    assert "is not empty" in one_sentence(error)
