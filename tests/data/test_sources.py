from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from scalora_dist.data import sources
from scalora_dist.data.rows import FROM_FILE, read_row
from scalora_dist.data.sources import load_examples
from scalora_dist.errors import UserError
from tests.support.refusals import one_sentence

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def load(
    name: Path | str,
    split: str = "train",
    size: int = 1,
    config_name: str | None = None,
    column_names: Sequence[str] = (),
    **options: Any,
) -> Dataset:
    return load_examples(
        str(name),
        split=split,
        seed=0,
        size=size,
        task_options=options,
        config_name=config_name,
        column_names=column_names,
    )


def read(name: Path | str, split: str = "train", **kwargs: Any) -> list[dict[str, Any]]:
    return [read_row(row) for row in load(name, split, **kwargs)]


def refused(name: Path | str, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(name, **kwargs)
    message = one_sentence(caught)
    assert message.endswith((".", ".)"))
    return message


def write_jsonl(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "files"
    path.mkdir()
    return path


@pytest.mark.floors
def test_reads_each_kind_of_file(tmp_path: Path) -> None:
    data = Dataset.from_list(ROWS)
    data.to_csv(tmp_path / "d.csv")
    data.to_csv(tmp_path / "d.tsv", sep="\t")
    data.to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.json").write_text(json.dumps(ROWS, indent=1))
    write_jsonl(tmp_path / "d.jsonl")
    write_jsonl(tmp_path / "LINES.JSON")
    for name in ("d.csv", "d.tsv", "d.parquet", "d.json", "d.jsonl", "LINES.JSON"):
        loaded = load(tmp_path / name)
        assert loaded.features == FROM_FILE and [read_row(row) for row in loaded] == ROWS, name
        assert loaded["file"][:] == [str(tmp_path / name)] * 2 and loaded["row"][:] == [1, 2]
    (tmp_path / "notes.txt").write_text("x\n")
    assert read(tmp_path / "notes.txt") == [{"text": "x"}]
    (tmp_path / "bare.csv").write_text("a,b\n")
    assert read(tmp_path / "bare.csv", column_names=("x", "y")) == [{"x": "a", "y": "b"}]


@pytest.mark.floors
def test_split_expressions(tmp_path: Path, folder: Path) -> None:
    rows = [{"text": str(i)} for i in range(20)]
    data = Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data, test=data.select([1, 2])).save_to_disk(tmp_path / "splits")
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", rows[1:3])
    write_jsonl(tmp_path / "d.jsonl", rows)
    for name in ("one", "splits", "files", "d.jsonl"):
        path = tmp_path / name
        assert read(path) == rows
        assert read(path, "train[:3]") == rows[:3]
        assert read(path, "train[10%:20%]") == rows[2:4]
        assert read(path, "train[-2:] + train[:1]") == rows[-2:] + rows[:1]
        assert "no examples" in refused(path, split="train[:0]")
        for bad in ("train[:3", "train[1]", "", "train[:101%]", "train[:5%](pct1_dropremainder)"):
            assert path.name in refused(path, split=bad)
        assert "train has 20 row(s)" in refused(path, split="train[30:]")
    for name in ("splits", "files"):
        assert read(tmp_path / name, "testing[:1]+train[:1]") == rows[1:2] + rows[:1]
        assert "has no split 'dev'; it has: " in refused(tmp_path / name, split="dev")
    for name in ("one", "d.jsonl"):
        assert read(tmp_path / name, "anything[1:2]") == rows[1:2]
        assert "single data set" in refused(tmp_path / name, split="train[:1]+test[:1]")


def test_the_format_of_a_saved_data_set_does_not_count(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2], "x": 0.5}]
    for kind in ("numpy", "torch"):
        Dataset.from_list(rows).with_format(kind).save_to_disk(tmp_path / kind)
        assert read(tmp_path / kind) == rows


def test_names_of_formats_are_no_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` would read what lies in the current folder."""
    (tmp_path / "requirements.txt").write_text("torch\n")
    monkeypatch.chdir(tmp_path)
    for name in ("text", "json"):
        assert "names a format" in refused(name)


def test_saved_data_sets_are_known_by_both_files(folder: Path) -> None:
    write_jsonl(folder / "state.json", ROWS[:1])
    write_jsonl(folder / "a.jsonl", ROWS[1:])
    assert read(folder) == [ROWS[1], ROWS[0]]


def test_files_of_a_folder_may_differ(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl(folder / "a.jsonl")
    write_jsonl(folder / "b.jsonl", [{"prompt": "a", "completion": "b", "source": "web"}])
    (folder / "c.csv").write_text("prompt,completion\nCSV,3\n")
    (folder / "empty.jsonl").touch()
    (folder / "sub").mkdir()
    write_jsonl(folder / "sub" / "D.JSONL", ROWS[:1])
    (folder / "old.zip").touch()
    for _ in range(2):  # also when the rows are in the cache
        loaded = load(f"{folder}/")
        assert "left out old.zip" in caplog.text
        caplog.clear()
    assert [Path(file).relative_to(folder).as_posix() for file in loaded["file"]] == [
        *("a.jsonl", "a.jsonl", "b.jsonl", "c.csv", "sub/D.JSONL")
    ]
    assert read_row(loaded[2])["source"] == "web" and read_row(loaded[3])["completion"] == "3"


def test_subsets(tmp_path: Path, folder: Path) -> None:
    write_jsonl(folder / "a.jsonl")
    write_jsonl(folder / "b.jsonl", ROWS[1:])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: a.jsonl\n"
        "- config_name: other\n  data_files: [{split: test, path: b.jsonl}]\n---\n"
    )
    assert "has the subsets main, other: name one with --dataset_config_name." in refused(folder)
    assert read(folder, config_name="main") == ROWS
    assert read(folder, "test", config_name="other") == ROWS[1:]
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for name in (folder / "a.jsonl", tmp_path / "saved", "reasoning_gym:chain_sum"):
        assert "no subsets" in refused(name, config_name="main")


@pytest.mark.parametrize(
    "message",
    [
        "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']"
        "\nExample of usage:\n\t`load_dataset('openai/gsm8k', 'main')`",
        "BuilderConfig 'x' not found. Available: ['main', 'socratic']",
    ],
)
def test_subsets_of_the_hub(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ValueError(message)

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    assert refused("openai/gsm8k") == (
        "The data set openai/gsm8k has the subsets main, socratic: name one with "
        "--dataset_config_name."
    )


def test_the_cache_is_used_until_something_changes(
    tmp_path: Path, cache: Path, folder: Path
) -> None:
    path = write_jsonl(folder / "a.jsonl")
    first = load(path)

    def files() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")}

    before = files()
    assert load(path)._fingerprint == first._fingerprint and files() == before
    assert load(folder)["file"][0] == str(path)
    stamp = path.stat().st_mtime_ns
    write_jsonl(path, ROWS[::-1])  # of the same size
    os.utime(path, ns=(stamp, stamp))  # and of the same time, as copies keep it
    assert read(path) == ROWS[::-1] and read(folder) == ROWS[::-1]
    (folder / "b.csv").write_text("x,y\n")
    assert "no examples" in refused(folder / "b.csv")
    assert read(folder / "b.csv", column_names=("a", "b")) == [{"a": "x", "b": "y"}]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("d.jsonl", '{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n', "d.jsonl, line 3: malformed"),
        ("d.jsonl", '{"text": "a"}\n{"text": "b', "d.jsonl, line 2: malformed"),
        ("d.jsonl", '{"text": "a\u2028b"}\n7\n', "d.jsonl, line 2: not a JSON object"),
        ("d.json", '[\n{"text": "a"},\n{"text": }\n]\n', "d.json, line 3: malformed"),
        ("d.json", '{"text": "a"}\n{"text" "b"}\n', "d.json, line 2: malformed"),
        (
            "d.csv",
            "text,b\n1,2\n3,4,5\n",
            "d.csv, row 2 (line 3): it has 3 cells, the header has 2",
        ),
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


def test_malformed_file_in_a_folder_is_named(folder: Path) -> None:
    write_jsonl(folder / "a.jsonl")
    (folder / "b.jsonl").write_text('{"prompt": "a", "completion": "b"}\nnonsense\n')
    assert f"{folder}/b.jsonl, line 2: malformed" in refused(folder)
    (folder / "b.jsonl").unlink()
    (folder / "c.parquet").write_text("no parquet")
    assert f"{folder}/c.parquet cannot be read" in refused(folder)
    (folder / "c.parquet").unlink()
    (folder / "d.csv").symlink_to("gone")
    assert f"{folder}/d.csv" in refused(folder)


def test_not_utf8_is_named_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n' + '{"text": "b"}'.encode("utf-16"))
    assert "d.jsonl, line 2: this is not UTF-8" in refused(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("name", "text"), [("d.jsonl", ""), ("d.jsonl", "\n \n"), ("d.json", "[]"), ("d.csv", "text\n")]
)
def test_empty_data_is_refused(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    message = refused(folder / name)
    assert name in message and ("empty" in message or "no examples" in message)
    assert "no examples" in refused(folder)


def test_missing_and_unknown_names(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "gone.jsonl")
    assert "does not exist" in refused("gone.jsonl")
    assert "does not exist" in refused("./gone")
    assert "no file or folder" in refused("nobody/nothing")
    assert "does not exist" in refused("gone.jsonl.gz") and "does not exist" in refused("a/b.tsv")
    for pattern in (f"{tmp_path}/*.jsonl", "data/*", "data/train-[0-9]"):
        assert "taken literally, so name the folder" in refused(pattern)
    (tmp_path / "a.png").write_text("x")
    assert ".jsonl" in refused(tmp_path / "a.png")
    (tmp_path / "bare").mkdir()
    assert "holds no" in refused(tmp_path / "bare")


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
