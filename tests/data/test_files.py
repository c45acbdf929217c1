from __future__ import annotations

import bz2
import csv
import datetime
import decimal
import gzip
import json
import lzma
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset

from scalora_dist.data.files import kind_of, read_files
from scalora_dist.data.rows import place, read_row
from scalora_dist.errors import UserError
from tests.support.refusals import one_sentence

PAIR = {"prompt": "a", "completion": "b"}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def found(path: Path, *names: str) -> list[dict[str, Any]]:
    return list(read_files([(str(path), path.name)], names))


def read(path: Path, *names: str) -> list[dict[str, Any]]:
    return [read_row(row) for row in found(path, *names)]


def refused(path: Path, *names: str) -> str:
    with pytest.raises(UserError) as caught:
        found(path, *names)
    message = one_sentence(caught)
    assert path.name in message and message.endswith(".")
    return message


@pytest.mark.parametrize("text", ["{}\n{}\n", "[{},\n {}\n]\n", " [{}, {}]", "\n{}\r\n\r\n{}"])
@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.ndjson", "D.JSONL"])
def test_json_is_read_by_its_content(tmp_path: Path, name: str, text: str) -> None:
    objects = [{"text": "a", "n": [1, None]}, {"other": None}]
    for item in objects:
        text = text.replace("{}", json.dumps(item), 1)
    for bom in ("", "\ufeff"):
        assert read(write(tmp_path / name, bom + text)) == objects


def test_one_object_is_one_row(tmp_path: Path) -> None:
    for name in ("d.json", "d.jsonl"):
        assert read(write(tmp_path / name, json.dumps(PAIR, indent=2))) == [PAIR]
        assert read(write(tmp_path / name, json.dumps(PAIR))) == [PAIR]
    assert read(write(tmp_path / "d.json", "[]")) == read(write(tmp_path / "d.jsonl", " \n")) == []


def test_json_values_are_as_the_file_holds_them(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "When?", "completion": "2021-03-04"},
        {"prompt": "a\u2028b\u0085c", "completion": "\ud800", "extra": {"b": None, "a": 1.10}},
        {"prompt": "1", "completion": 4, "tools": [{"x": None}, {"y": [2**70]}]},
        {"prompt": None},
    ]
    path = write(tmp_path / "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read(path) == rows
    raw = '{"prompt": "a\u2028b\u0085c"}'
    assert read(write(path, raw + "\n" + raw)) == [{"prompt": "a\u2028b\u0085c"}] * 2
    assert read(write(tmp_path / "d.json", json.dumps(rows, indent=1))) == rows


def test_a_value_of_another_type_may_come_late(tmp_path: Path) -> None:
    early = [{"instruction": "a " * 50, "input": None, "output": "2021-03-04"}] * 5000
    late = [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": "late"}]
    lines = "".join(json.dumps(row) + "\n" for row in early + late)
    path = write(tmp_path / "d.jsonl", lines)
    assert read(path) == early + late


def test_rows_know_their_place(tmp_path: Path) -> None:
    lines = write(tmp_path / "d.jsonl", '\n{"a": 1}\n\n{"a": 2}\n')
    assert [(row["row"], row["line"]) for row in found(lines)] == [(1, 2), (2, 4)]
    assert place(found(lines)[1], 7, "name") == "d.jsonl, row 2 (line 4)"
    listed = write(tmp_path / "d.json", '[\n{"a":\n1},\n\n{"a": 2}]')
    assert [row["line"] for row in found(listed)] == [2, 5]
    table = write(tmp_path / "d.csv", 'a,b\n1,"x\ny"\n\n2,z\n')
    assert [(row["row"], row["line"]) for row in found(table)] == [(1, 2), (2, 5)]
    text = write(tmp_path / "d.txt", "x\n\ny\n")
    assert [(row["row"], row["line"]) for row in found(text)] == [(1, 1), (2, 3)]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("d.jsonl", '{"a": 1}\n\n{"a": "b"\n{}\n', "d.jsonl, line 3: malformed JSON (Expecting"),
        (
            "d.jsonl",
            '{"a": 1}\n{"b": "\n',
            "d.jsonl, line 2: malformed JSON (Unterminated string start",
        ),
        (
            "d.jsonl",
            '{"a": "\t"}',
            "line 1: malformed JSON (Invalid control character at column 8).",
        ),
        ("d.jsonl", '{"a" 1}\n{"a": 1}\n', "line 1: malformed JSON (Expecting ':' delimiter at co"),
        ("d.jsonl", '{"a": 1\n{"a": 1}\n', "line 1: malformed JSON (Expecting ',' delimiter at co"),
        ("d.jsonl", '{"a": 1}\n[1]\n', 'line 2: not a JSON object such as {"prompt": ...}.'),
        ("d.jsonl", "[1]\n[2]\n", "line 1: not a JSON object"),
        ("d.json", '[\n{"a": 1},\n7\n]', "d.json, line 3: not a JSON object"),
        ("d.json", "7", "line 1: not a JSON object"),
        ("d.json", '[\n{"a": 1},\n{"a": }\n]\n', "line 3: malformed JSON (Expecting value at col"),
        ("d.json", '[{"a": 1}\n{"a": 2}]\n', "line 2: malformed JSON (Expecting ',' delimiter"),
        ("d.json", '[{"a": 1}', "line 1: malformed JSON (Expecting ',' delimiter"),
        ("d.json", '[{"a": 1},]', "line 1: malformed JSON"),
        ("d.json", '[{"a": 1}]\n{}', "line 2: malformed JSON (Extra data"),
        ("d.json", '{\n"a": 1,\n}\n', "malformed JSON"),
        ("d.json", '{"a": 1}\nno\n', "line 2: malformed JSON (Expecting value at column 1)"),
        (
            "d.csv",
            "a,b\n1,2\n\n1,2,3\n",
            "d.csv, row 2 (line 4): it has 3 cells, the header has 2.",
        ),
        ("d.csv", "a,b\n1\n", "d.csv, row 1 (line 2): it has 1 cell, the header has 2."),
        ("d.csv", 'a,b\n1,2\n1,"2\n3,4\n', "d.csv, line 3: malformed (unexpected end of data)"),
        ("d.csv", 'a,b\n"1"x,2\n', "d.csv, line 2: malformed"),
        ("d.csv", "a, b,a \n1,2,3\n", "d.csv: 2 columns have the name 'a'."),
        ("d.csv", "a,,\n1,2,3\n", "d.csv: 2 columns have the name ''."),
        ("d.tsv", "a\tb\n1\t2\t3\n", "d.tsv, row 1 (line 2): it has 3 cells, the header has 2."),
        ("d.parquet", "no parquet", "d.parquet cannot be read: "),
        ("d.jsonl.gz", "no archive", "d.jsonl.gz cannot be read: "),
        ("d.csv.xz", "no archive", "d.csv.xz cannot be read: "),
        ("d.csv.zst", "no archive", "d.csv.zst cannot be read: "),
        ("d.png", "", "must end in .json, .jsonl"),
        ("d.parquet.gz", "", "must end in .json, .jsonl"),
    ],
)
def test_malformed_files_are_named_with_the_place(
    tmp_path: Path, name: str, text: str, expected: str
) -> None:
    assert expected in refused(write(tmp_path / name, text))


def test_text_that_is_not_utf8_is_named_with_the_line(tmp_path: Path) -> None:
    latin = "a,b\nx,y\nz,\xe9\n".encode("latin-1")
    for name in ("d.csv", "d.txt", "d.jsonl", "d.tsv"):
        assert "line 1: this is not UTF-8" in refused(
            write(tmp_path / name, "a\n".encode("utf-16"))
        )
    assert "d.csv, line 3: this is not UTF-8 text." in refused(write(tmp_path / "d.csv", latin))


def test_cells_are_their_text(tmp_path: Path) -> None:
    text = (
        'prompt , completion\nq,4\nq,"4"\nq,True\nq,NA\nq,None\nq,null\nq,\nq,"x, ""y"""\nq, z \n'
    )
    answers = ["4", "4", "True", "NA", "None", "null", "", 'x, "y"', " z "]
    for bom, end in (("", "\n"), ("\ufeff", "\r\n")):
        path = write(tmp_path / "D.CSV", bom + text.replace("\n", end))
        assert read(path) == [{"prompt": "q", "completion": answer} for answer in answers]


def test_quoted_cells_keep_line_breaks_and_may_be_long(tmp_path: Path) -> None:
    cells = ["a\nb", "c\r\nd\u2028e", "x" * 200_000, 'say "\n"']
    for name, delimiter in (("d.csv", ","), ("d.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["", "text"], *([str(i), cell] for i, cell in enumerate(cells))])
        assert [row["text"] for row in read(tmp_path / name)] == cells, name
    one = write(tmp_path / "one.tsv", 'text\n"a\nb"\nc\n')
    assert read(one) == [{"text": "a\nb"}, {"text": "c"}]


def test_quotes_of_a_tsv_file_may_be_plain_text(tmp_path: Path) -> None:
    # As in GLUE: an opening quote of one line and a closing one of another would enclose both.
    for lines in (
        ['1\t"He said', '2\t" yes " he said', '3\tno"'],
        ['1\t"He said', '2\tso"', "3\tno"],
    ):
        path = write(tmp_path / "d.tsv", "\ufeffid\tsentence\r\n" + "\r\n".join(lines))
        assert read(path) == [
            dict(zip(("id", "sentence"), line.split("\t"), strict=True)) for line in lines
        ]
        assert found(path)[0]["note"].startswith("d.tsv: its quotes are read as text")
    path = write(tmp_path / "d.tsv", 'id\tsentence\n1\t"a\tb"\n2\t"say ""c"""\n')
    assert read(path) == [{"id": "1", "sentence": "a\tb"}, {"id": "2", "sentence": 'say "c"'}]


def test_another_delimiter_is_told(tmp_path: Path) -> None:
    assert "its header has no comma" in refused(
        write(tmp_path / "d.csv", "prompt;completion\na;b\n")
    )


def test_json_that_python_cannot_read_is_named_with_the_line(tmp_path: Path) -> None:
    for bad in ("9" * 5000, "[" * 100_000):
        for text, where in ((f'{{"a": 1}}\n{{"a": {bad}}}\n', "line 2"), (f"[\n{bad}", "line 1")):
            message = refused(write(tmp_path / "d.jsonl", text))
            assert where in message and "JSON" in message


def test_tables_without_a_header(tmp_path: Path) -> None:
    table = write(tmp_path / "d.tsv", "gj04\t1\tOne.\ngj04\t0\tTwo.\n")
    assert [row["s"] for row in read(table, "source", "label", "s")] == ["One.", "Two."]
    assert found(table, "source", "label", "s")[0]["line"] == 1
    assert "row 1 (line 1): it has 3 cells, --column_names has 2." in refused(table, "label", "s")
    with pytest.raises(UserError, match="--column_names: 2 columns have the name 's'"):
        found(table, "s", "label", "s")
    headed = write(tmp_path / "h.tsv", "source\tlabel \ts\ngj04\t1\tOne.\n")
    assert read(headed, "source", "label", "s") == read(table, "source", "label", "s")[:1]
    lines = write(tmp_path / "d.jsonl", json.dumps(PAIR))
    assert read(lines, "source") == [PAIR]  # it is for tables


def test_lines_of_text(tmp_path: Path) -> None:
    path = write(tmp_path / "d.txt", "\ufeffone \r\n\r\n  \n two\u2028three\n4")
    assert [row["text"] for row in read(path)] == ["one ", " two\u2028three", "4"]


def test_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(20_000)).encode()
    half = len(plain) // 2
    for suffix, compress in (
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".ZST", zstandard.ZstdCompressor().compress),
    ):
        # Two archives one after the other are an archive too.
        whole = compress(plain[:half]) + compress(plain[half:])
        path = write(tmp_path / f"d.jsonl{suffix}", whole)
        assert len(read(path)) == 20_000, suffix
        assert "cannot be read" in refused(write(path, whole[:-100]))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install zstandard" in refused(tmp_path / "d.jsonl.ZST")


def test_parquet_becomes_json(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "text": None,
            "day": datetime.date(2021, 3, 4),
            "time": datetime.datetime(2021, 3, 4, 5, 6),
            "price": decimal.Decimal("1.50"),
            "image": {"bytes": b"\x89PNG", "path": "a.png"},
            "n": 4,
            "messages": [{"role": "user", "content": "a"}, {"role": "tool", "name": "f"}],
        },
    ] * 1500
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "D.Parquet")
    read_back = read(tmp_path / "D.Parquet")
    assert len(read_back) == 1500 and read_back[-1] == {
        "text": None,
        "day": "2021-03-04",
        "time": "2021-03-04T05:06:00",
        "price": "1.50",
        "n": 4,
        "messages": [{"role": "user", "content": "a"}, {"role": "tool", "name": "f"}],
    }
    assert place(found(tmp_path / "D.Parquet")[2], 9, "x") == "D.Parquet, row 3"


def test_a_parquet_column_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    """Of all rows, also where only one of them is to blame."""
    good, count = pa.array([b"\xc3\xa9t\xc3\xa9"] * 300, pa.binary()), 300  # Spark writes texts so
    years = [0] * 299 + [253402300800]  # the last is in the year 10000
    table = pa.table(
        {
            "text": good,
            "fixed": pa.array([b"a"] * count, pa.binary(1)),
            "image": pa.array([b"a"] * 299 + [b"\xff"], pa.binary()),
            "year": pa.array(years, pa.timestamp("s")),
            "nested": [{"bytes": b"\x89PNG"}] * count,
            "id": pa.array([2**63 - 1] * count),
        }
    )
    pq.write_table(table, tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == [{"text": "été", "fixed": "a", "id": 2**63 - 1}] * count
    (note,) = {row["note"] for row in found(tmp_path / "d.parquet")}
    assert re.findall(r"its column (\w+) is left out", note) == ["nested", "image", "year"]


@pytest.mark.parametrize("folder", ["[ab]", "a*", "what?", "{x,y}", "with blank", "s3::x", "%41"])
def test_paths_are_literal(tmp_path: Path, folder: str) -> None:
    Dataset.from_list([PAIR]).to_parquet(tmp_path / "p.parquet")
    for name, content in (
        ("d[1].jsonl", json.dumps(PAIR)),
        ("*.csv", "prompt,completion\na,b\n"),
        ("a::b?.tsv", "prompt\tcompletion\na\tb\n"),
        ("file:{1}.parquet", (tmp_path / "p.parquet").read_bytes()),
    ):
        assert read(write(tmp_path / folder / name, content)) == [PAIR]


def test_kinds() -> None:
    kinds = {
        "a.b.CSV.Gz": ".csv",
        "a.JSON": ".json",
        "a.gz": None,
        ".csv": None,
        "a.txt.zst": ".txt",
    }
    assert {name: kind_of(Path(name)) for name in kinds} == kinds
