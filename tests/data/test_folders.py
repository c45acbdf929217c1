from __future__ import annotations

from pathlib import Path

import pytest

from scalora_dist.data.folders import find_splits, match_split
from scalora_dist.errors import UserError
from tests.support.refusals import one_sentence


def make(folder: Path, *names: str, readme: str | None = None) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    if readme is not None:
        (folder / "README.md").write_text(f"---\n{readme}\n---\n# Data\n")
    return folder


def splits(folder: Path, config_name: str | None = None) -> dict[str, list[str]]:
    found = find_splits(folder, "the/folder", config_name)
    return {split: [str(f.relative_to(folder)) for f in files] for split, files in found.items()}


def refused(folder: Path, config_name: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        find_splits(folder, "the/folder", config_name)
    message = one_sentence(caught)
    assert "the/folder" in message and message.endswith(".")
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "[a-z]* {x} ?::y"  # never a pattern
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("my-training_set.csv", "train"),
        ("TRAIN01.JSONL", "train"),
        ("dev.tsv", "validation"),
        ("valid/a.jsonl", "validation"),
        ("squad val.json", "validation"),
        ("eval/en/a.jsonl", "test"),
        ("train/test.csv", "test"),
        ("test/train set/a.csv", "train"),
        ("evaluation.1.txt.gz", "test"),
        ("data/train-00000-of-00005.parquet", "train"),
        ("data/dev-00000-of-00005-abc.parquet", "validation"),
        ("data/train_sft-00001-of-00005.parquet", "train_sft"),
        ("train/part-00000-of-00002.jsonl", "train"),
        ("part-00000-of-00002.jsonl", "train"),  # a name of its own only in a folder `data`
        # No split in the name, so "train" as nothing else has one either.
        ("trainer.csv", "train"),
        ("latest.csv", "train"),
        ("train_test.csv", "train"),
    ],
)
def test_the_name_tells_the_split(folder: Path, name: str, split: str) -> None:
    assert splits(make(folder, name)) == {split: [name]}


def test_all_kinds_are_read_in_the_order_of_their_paths(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["B.CSV", "a.jsonl", "b.parquet", "c/a.tsv.gz", "c/b/a.json", "c.ndjson"]
    make(folder, *names, ".hidden.jsonl", ".git/a.json", "__pycache__/a.json")
    make(folder, "README.md", "LICENSE.txt", "readme_zh.md", "dataset_infos.json")
    order = ["B.CSV", "a.jsonl", "b.parquet", "c/a.tsv.gz", "c/b/a.json", "c.ndjson"]
    assert splits(folder) == {"train": order}
    assert not caplog.records


def test_what_is_left_out_is_named_each_time(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(folder, "train.jsonl", "test.jsonl", "more.jsonl", "notes.txt", "old.zip")
    for _ in range(2):
        assert splits(folder) == {"test": ["test.jsonl"], "train": ["train.jsonl"]}
        (record,) = caplog.records
        assert record.getMessage() == (
            "the/folder: left out old.zip (not a data file), notes.txt (text beside data files of "
            "other kinds), more.jsonl (its name tells no split)."
        )
        caplog.clear()
    make(folder, *(f"pictures/{i}.png" for i in range(9)))
    splits(folder)
    assert "old.zip" in caplog.text and "3.png" in caplog.text
    assert "4.png" not in caplog.text and caplog.text.endswith(" and 7 more.\n")


def test_text_counts_where_there_is_nothing_else(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert splits(make(folder, "train.txt", "test.txt.gz"))["train"] == ["train.txt"]
    assert not caplog.records


def test_folders_without_data(folder: Path) -> None:
    assert "holds no .json" in refused(folder)
    assert "holds no .json" in refused(make(folder, "a.png", "README.md", ".a.jsonl"))
    assert "no subset 'main'" in refused(make(folder, "a.jsonl"), "main")


def test_links_show_no_file_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path / "elsewhere", "a.jsonl")
    make(tmp_path / "data", "b/b.jsonl")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "b" / "around").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "c.jsonl").symlink_to("b/b.jsonl")
    (tmp_path / "data" / "d.jsonl").symlink_to(tmp_path / "elsewhere" / "a.jsonl")
    assert splits(tmp_path / "data") == {"train": ["b/b.jsonl", "d.jsonl"]}
    (record,) = caplog.records
    for named in ("a (a link to a folder)", "around (a link", "c.jsonl (the same file as b.jsonl)"):
        assert named in record.getMessage()


def test_splits_are_found_by_other_words() -> None:
    assert match_split("dev", ["train", "validation"], "f") == "validation"
    assert match_split("test", ["train", "eval"], "f") == "eval"
    assert match_split("val", ["validation", "val"], "f") == "val"
    with pytest.raises(UserError, match="f has no split 'dev'; it has: train, test"):
        match_split("dev", ["train", "test"], "f")


SUBSETS = """
license: mit
configs:
- config_name: main
  data_files: a.jsonl
- config_name: lists
  data_files: [a.jsonl, "sub/*.jsonl"]
- config_name: splits
  data_files:
  - split: train
    path: ["sub/**"]
  - {split: dev, path: "[ab].jsonl"}
- config_name: below
  data_dir: sub
- config_name: both
  data_dir: sub
  data_files: "*.jsonl"
- config_name: gone
  data_files: gone/*.csv
- config_name: outside
  data_dir: nowhere
- config_name: wrong
  data_files: [{path: a.jsonl}]
- config_name: absolute
  data_files: /a/*.jsonl
"""


def test_subsets_of_the_readme(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(folder, "a.jsonl", "b.jsonl", "sub/train.jsonl", "sub/x/test.csv", readme=SUBSETS)
    assert "has the subsets main, lists, splits" in refused(folder)
    assert "--dataset_config_name" in refused(folder)
    assert "main, lists" in refused(folder, "other") and "'other'" in refused(folder, "other")
    assert splits(folder, "main") == {"train": ["a.jsonl"]}
    assert splits(folder, "lists") == {"train": ["a.jsonl", "sub/train.jsonl"]}
    assert splits(folder, "splits") == {
        "train": ["sub/train.jsonl", "sub/x/test.csv"],
        "dev": ["a.jsonl", "b.jsonl"],
    }
    assert splits(folder, "below") == {"train": ["sub/train.jsonl"], "test": ["sub/x/test.csv"]}
    assert splits(folder, "both") == {"train": ["sub/train.jsonl"]}
    assert "gone/*.csv" in refused(folder, "gone") and "nowhere" in refused(folder, "outside")
    assert "data_files" in refused(folder, "wrong")
    assert not caplog.records  # files of other subsets are not left out
    make(folder, "c.csv")
    splits(folder, "main")
    (record,) = caplog.records
    assert "left out c.csv (README.md lists it in no subset)" in record.getMessage()


def test_the_default_subset(folder: Path) -> None:
    make(folder, "a.jsonl", "b.jsonl")
    one = "- config_name: one\n  data_files: a.jsonl\n"
    two = "- config_name: {}\n  data_files: b.jsonl\n"
    assert splits(make(folder, readme="configs:\n" + one)) == {"train": ["a.jsonl"]}
    make(folder, readme="configs:\n" + one + two.format("default"))
    assert splits(folder) == {"train": ["b.jsonl"]}
    make(folder, readme="configs:\n" + one + two.format("two") + "  default: true\n")
    assert splits(folder) == {"train": ["b.jsonl"]}
    assert splits(folder, "one") == {"train": ["a.jsonl"]}


def test_a_file_of_the_name_of_a_pattern(folder: Path) -> None:
    make(folder, "a[1].jsonl", "a1.jsonl", readme='configs: [{data_files: "a[1].jsonl"}]')
    assert splits(folder) == {"train": ["a[1].jsonl"]}


def test_a_readme_that_says_how_to_read_files_is_refused(folder: Path) -> None:
    subset = "configs: [{config_name: main, data_files: a.csv, sep: ';'}]"
    assert "sets sep, which is not read" in refused(make(folder, "a.csv", readme=subset))


@pytest.mark.parametrize("readme", ["configs: [a", "configs: {a: b}", "- a", "configs: [a]"])
def test_unusable_readmes(folder: Path, readme: str) -> None:
    assert "README.md" in refused(make(folder, "a.jsonl", readme=readme))
