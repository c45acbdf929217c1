from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from scalora_dist.data.sources import load_examples
from scalora_dist.errors import UserError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def load(name: Path | str, split: str = "train", size: int = 1, **options: Any) -> Dataset:
    return load_examples(str(name), split=split, seed=0, size=size, task_options=options)


def refused(name: Path | str, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(name, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", ".)"))
    return message


def write_jsonl(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.floors
def test_reads_each_kind_of_file(tmp_path: Path) -> None:
    data = Dataset.from_list(ROWS)
    data.to_csv(tmp_path / "d.csv")
    data.to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.json").write_text(json.dumps(ROWS, indent=1))
    write_jsonl(tmp_path / "d.jsonl")
    write_jsonl(tmp_path / "lines.json")
    for name in ("d.csv", "d.parquet", "d.json", "d.jsonl", "lines.json"):
        assert load(tmp_path / name).to_list() == ROWS, name


def test_a_lone_file_is_the_split_asked_for_and_slices_work(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl")
    assert load(path, split="test").to_list() == ROWS
    assert load(path, split="train[:1]").to_list() == ROWS[:1]


def test_reads_folders(tmp_path: Path) -> None:
    data = Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "train.jsonl")
    write_jsonl(tmp_path / "files" / "test.jsonl", ROWS[1:])
    assert load(tmp_path / "one").to_list() == ROWS
    assert load(tmp_path / "splits", split="test").to_list() == ROWS[1:]
    assert load(tmp_path / "files").to_list() == ROWS
    assert load(tmp_path / "files", split="test").to_list() == ROWS[1:]
    assert "train, test" in refused(tmp_path / "splits", split="dev")
    assert "slice" in refused(tmp_path / "one", split="train[:1]")
    (tmp_path / "bare").mkdir()
    assert "holds no" in refused(tmp_path / "bare")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("d.jsonl", '{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n', "d.jsonl, line 3: malformed"),
        ("d.jsonl", '{"text": "a"}\n{"text": "b', "d.jsonl, line 2: malformed"),
        ("d.jsonl", '{"text": "a\u2028b"}\n7\n', "d.jsonl, line 2: not a JSON object"),
        ("d.json", '[\n{"text": "a"},\n{"text": }\n]\n', "d.json, line 3: malformed"),
        ("d.json", '{"text": "a"}\n{"text" "b"}\n', "d.json, line 2: malformed"),
        ("d.csv", "text,b\n1,2\n3,4,5\n", "line 3"),
        ("d.parquet", "no parquet", "d.parquet cannot be read: "),
    ],
)
def test_malformed_files_are_named_with_the_line(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    text: str,
    expected: str,
) -> None:
    (tmp_path / name).write_text(text)
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)  # so caplog sees it
    assert expected in refused(tmp_path / name)
    assert caplog.text == ""  # datasets' own error lines would bury ours
    (tmp_path / name).write_text('{"text": "ok"}\n' if "json" in name else "text\nok\n")
    if name != "d.parquet":
        assert len(load(tmp_path / name)) == 1  # once mended, nothing stale is read


def test_malformed_file_in_a_folder_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "completion": "b"}\nnonsense\n')
    assert "b.jsonl, line 2: malformed" in refused(tmp_path)


def test_not_utf8_is_named_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n' + '{"text": "b"}'.encode("utf-16"))
    assert "d.jsonl, line 2: this is not UTF-8" in refused(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("name", "text"), [("d.jsonl", ""), ("d.jsonl", "\n \n"), ("d.json", "[]"), ("d.csv", "text\n")]
)
def test_empty_data_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    message = refused(tmp_path / name)
    assert name in message and ("empty" in message or "no examples" in message)


def test_missing_and_unknown_names(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "gone.jsonl")
    assert "does not exist" in refused("gone.jsonl")
    assert "does not exist" in refused("./gone")
    assert "no file or folder" in refused("nobody/nothing")
    (tmp_path / "notes.txt").write_text("x")
    assert ".jsonl" in refused(tmp_path / "notes.txt")


@pytest.mark.floors
def test_generates_from_the_seed_without_duplicates() -> None:
    data = load("reasoning_gym:chain_sum", size=60, min_terms=2, max_terms=2, max_digits=1)
    questions = data["query"][:]
    # 10 x 10 numbers x (+, -): small enough that 60 draws repeat themselves
    assert len(questions) == len(set(questions)) == 60
    assert all(
        eval(q.split(": ")[1].removesuffix("=")) == int(a)
        for q, a in zip(questions, data["response"][:], strict=True)
    )
    again = load_examples(
        "reasoning_gym:chain_sum",
        split="train",
        seed=1,
        size=60,
        task_options={"min_terms": 2, "max_terms": 2, "max_digits": 1},
    )
    assert again["query"][:] != questions


def test_bad_tasks_and_options_say_what_exists() -> None:
    message = refused("reasoning_gym:chain_sums")
    assert "did you mean chain_sum" in message and "leg_counting" in message
    message = refused("reasoning_gym:chain_sum", max_term=3)
    assert "'max_term'" in message and "max_terms" in message and "seed" not in message
    assert "max_terms must be" in refused("reasoning_gym:chain_sum", min_terms=5, max_terms=2)
    assert "different questions" in refused(
        "reasoning_gym:chain_sum", size=1000, min_terms=2, max_terms=2, max_digits=1
    )
    assert "at least 1" in refused("reasoning_gym:chain_sum", size=0)
