"""`scalora checkpoint`: the table holds what the run saved, and damage is told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from scalora_dist.checkpoint import command
from scalora_dist.checkpoint.command import checkpoint_command, listed, render, size
from scalora_dist.checkpoint.contents import kind_of, tensors_by_kind
from scalora_dist.checkpoint.manifest import (
    INDEX,
    MANIFEST,
    STATE,
    FileRecord,
    faults,
    write_synced,
)
from scalora_dist.errors import UserError
from tests.support import runs, tiny_models, tiny_runs
from tests.support.ranks import Ranks
from tests.support.refusals import one_sentence

GetRanks = Callable[[int], Ranks]
STEPS = 4
RANK_FILE = "rank-00001.safetensors"
ALL = {"max_steps": STEPS, "save_steps": 2, "eval_size": None}
# Runs that between them save tensors of all kinds: (ranks, engine, options).
RUNS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "weight": (2, "zero3", {"bf16": True, "rank_monitor_steps": 2, "eval_size": 5}),
    "carry": (1, "local", {"merge_target": "carry", "bf16": True}),
    "core": (1, "local", {"method": "lora-xs"}),
}


@pytest.fixture(scope="module")
def run(ranks: GetRanks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``run(name)``: the output_dir of one of ``RUNS``, trained once."""
    task = tiny_models.save_task(tmp_path_factory.mktemp("task"))
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            count, engine, others = RUNS[name]
            made[name] = tmp_path_factory.mktemp(name) / "run"
            case = tiny_runs.options(task, made[name], engine, **(ALL | others))
            ranks(count).run(tiny_runs.train, case)
        return made[name]

    return get


@pytest.fixture
def copied(run: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint of two ranks that a test may damage."""
    folder = tmp_path / f"checkpoint-{STEPS}"
    shutil.copytree(run("weight") / folder.name, folder)
    return folder


def shown(capsys: pytest.CaptureFixture[str], named: Path) -> dict[str, list[str]]:
    """{name of a row: its lines} of the table. A damaged checkpoint must give status 1."""
    status: object = 0
    try:
        checkpoint_command([str(named)])
    except SystemExit as ending:
        status = ending.code
    rows: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        name, _, text = line[2:].partition("  ")
        if name:
            lines = rows.setdefault(name, [])
        lines.append(text.strip())
    assert status == int("DAMAGED" in rows) and ("state" in rows) == (status == 0)
    return rows


OF_TOMORROW = b'{"tensors": {"a": ["F9", 1, 0]}, "cuts": [[[0], [0]]]}'


def change_state(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change state.json and its checksum: what another version would have written."""
    state = json.loads((folder / STATE).read_text())
    change(state)
    replace(folder, STATE, json.dumps(state).encode())


def replace(folder: Path, name: str, content: bytes) -> None:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    files[name] = write_synced(folder / name, content)
    (folder / MANIFEST).write_text(json.dumps({"files": files}))


def test_a_sound_checkpoint_is_described(
    run: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("weight") / f"checkpoint-{STEPS}"
    rows = shown(capsys, folder)
    state = json.loads((folder / STATE).read_text())
    assert rows["checkpoint"] == [str(folder)]
    assert rows["step"] == [f"{STEPS} of {STEPS}"]
    assert rows["saved on"] == ["2 rank(s), cpu"]
    assert rows["method"] == ["scalora, rank 4, merges into its weight"]
    assert rows["dtype"] == ["bfloat16"]
    model = state["options"]["model"]["model_name_or_path"]
    assert rows["base model"] == [f"{model} (checksum {state['base']})"]
    assert {"--bf16 True", "--max_length 24", "--lora_dropout 0.1"} <= set(rows["options"])
    options = [line.split()[0] for line in rows["options"]]
    assert not {"--scaling_rule", "--seed", "--dataset", "--output_dir"} & set(options)
    losses = [f"{loss:.4f}" for loss in runs.losses(run("weight"))]
    assert rows[f"losses of the last {STEPS} step(s)"] == [" ".join(losses)]
    assert rows["held-out loss before the first step"] == [
        f"{state['progress']['before']['loss']:.4f}"
    ]
    assert rows["versions"] == [f"{name} {x}" for name, x in state["versions"].items()]
    names = [line.split(",")[0] for line in rows["files"][1:]]
    assert names == ["rank-00000.safetensors", RANK_FILE, INDEX, STATE]


def test_a_folder_of_a_run_is_its_newest_checkpoint_and_a_line_for_each_other(
    run: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = shown(capsys, run("weight"))
    assert rows["checkpoint"] == [str(run("weight") / f"checkpoint-{STEPS}")]
    (other,) = rows["checkpoint-2"]
    assert other.startswith("4 files, ") and other.endswith("; not read")


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        (
            "weight",
            {
                "masters of trained parameters": 28,
                "AdamW's moments": 56,
                "W of adapted layers": 14,
                "low halves": 14,
                "sketches of the rank monitor": 16,
                "random states": 6,
            },
        ),
        (
            "carry",
            {
                "masters of trained parameters": 28,
                "AdamW's moments": 56,
                "carry C and D": 28,
                "low halves": 28,
                "random states": 3,
            },
        ),
        (
            "core",
            {
                "masters of trained parameters": 14,
                "AdamW's moments": 28,
                "frozen U and V": 28,
                "random states": 3,
            },
        ),
    ],
)
def test_all_tensors_are_counted_by_kind(
    run: Callable[[str], Path], name: str, kinds: dict[str, int]
) -> None:
    """Two layers of seven linear ones: A and B each have a master and two moments."""
    folder = run(name) / f"checkpoint-{STEPS}"
    amounts = tensors_by_kind(folder)
    assert not isinstance(amounts, str)
    assert {kind: amount.tensors for kind, amount in amounts.items()} == kinds
    numbers = count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no dictionary
                numbers += tensors.get_tensor(key).numel()
                count += tensors.get_tensor(key).nbytes
    assert sum(amount.numbers for amount in amounts.values()) == numbers
    assert sum(amount.bytes for amount in amounts.values()) == count


def test_a_carry_has_a_line(run: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = shown(capsys, run("carry"))["carry"]
    assert line.startswith("16 to 16 columns used of 14 layers, of 76 each; lost at most ")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.weight", "masters of trained parameters"),  # full fine-tuning
        ("x.lora_A.default.weight", "masters of trained parameters"),
        ("x.lora_A.default.weight.v", "AdamW's moments"),
        ("y.weight", "W of adapted layers"),
        ("y.m", "masters of trained parameters"),  # a parameter that is called m
    ],
)
def test_names_that_other_methods_save(name: str, kind: str) -> None:
    trained = ["x.weight", "x.lora_A.default.weight"]
    names = {f"{x}{end}" for x in trained for end in ("", ".m", ".v")} | {"y.weight", "y.m"}
    assert kind_of(name, names) == kind


def shorten(folder: Path) -> None:
    data = (folder / RANK_FILE).read_bytes()
    (folder / RANK_FILE).write_bytes(data[:-1])


def without_index(folder: Path) -> None:
    """A checkpoint of an older version, with a damaged file."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    del files[INDEX]
    (folder / INDEX).unlink()
    (folder / MANIFEST).write_text(json.dumps({"files": files}))
    (folder / RANK_FILE).write_bytes(b"short")


def flip(folder: Path) -> None:
    data = bytearray((folder / RANK_FILE).read_bytes())
    data[-1] ^= 1
    (folder / RANK_FILE).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (shorten, f"{RANK_FILE} has "),
        (flip, f"{RANK_FILE} is damaged (its checksum differs)"),
        (lambda x: (x / RANK_FILE).unlink(), f"{RANK_FILE} is missing"),
        (lambda x: (x / RANK_FILE).write_bytes(b"short"), f"{RANK_FILE} has 5 bytes, not "),
        (lambda x: (x / INDEX).unlink(), f"{INDEX} is missing"),
        (lambda x: replace(x, INDEX, b"{"), f"{INDEX} cannot be read"),
        (lambda x: replace(x, INDEX, OF_TOMORROW), f"{INDEX} cannot be read"),
        (without_index, f"{RANK_FILE} has no readable header"),
        (lambda x: (x / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda x: (x / MANIFEST).write_text("{"), "manifest.json is damaged"),
        (lambda x: (x / STATE).unlink(), "state.json is missing"),
        (lambda x: replace(x, STATE, b"{"), "state.json cannot be read as JSON"),
        (lambda x: replace(x, STATE, b"\xff"), "state.json cannot be read as JSON"),
        (lambda x: replace(x, STATE, b"[]"), "state.json holds no state of a run"),
        (lambda x: replace(x, STATE, b"{}"), "state.json has format None, and this version reads"),
        (lambda x: change_state(x, lambda s: s.update(format=3)), "state.json has format 3, and"),
        (
            lambda x: change_state(x, lambda s: s.pop("progress")),
            "state.json does not hold what format 2 holds",
        ),
        (
            lambda x: change_state(x, lambda s: s.update(options=[])),
            "state.json does not hold what format 2 holds",
        ),
        (
            lambda x: change_state(x, lambda s: s.update(versions="?")),
            "state.json does not hold what format 2 holds",
        ),
    ],
)
def test_damage_is_told_with_status_1(
    copied: Path, damage: Callable[[Path], object], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copied)
    rows = shown(capsys, copied)
    assert [line for line in rows["DAMAGED"] if line.startswith(told)], rows["DAMAGED"]
    # What is readable is told all the same.
    assert ("step" in rows) == ("state.json" not in told)
    assert ("AdamW's moments" in rows) == ("read" not in told or "state" in told)


def test_what_other_versions_wrote_is_told(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another version of a library, an option that is not known here, and one that is missing."""

    def change(state: dict[str, Any]) -> None:
        state["versions"] |= {"torch": "1.0", "deepspeed": "0.1"}
        state["versions"]["gone"] = "3.1"
        state["options"]["train"]["of_tomorrow"] = ["a b", 1]
        del state["options"]["train"]["save_total_limit"]
        state["progress"]["tally"]["skipped"] = 2
        state["progress"]["health"]["recent"] = [2.5, None]
        state["options"]["train"]["max_steps"] = -1

    change_state(copied, change)
    rows = shown(capsys, copied)
    assert any(line.startswith("torch 1.0 (2.") for line in rows["versions"])
    assert rows["versions"][-1] == "gone 3.1 (not installed now)"
    assert "--of_tomorrow 'a b' 1" in rows["options"]
    assert rows["step"] == [f"{STEPS} of 1 epoch(s), 2 skipped"]
    assert rows["losses of the last 2 step(s)"] == ["2.5000 skipped"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "checkpoint-3.partial").mkdir()
    for words, told in (
        ([str(tmp_path)], "is no checkpoint and holds none"),
        ([str(tmp_path / "checkpoint-3.partial")], "is no checkpoint and holds none"),
        ([str(tmp_path / "file")], "is no folder"),
        ([str(tmp_path / "checkpoint-9")], "is no folder"),
        ([], "name one folder"),
        (["a", "b"], "name one folder"),
        (["--all"], "name one folder"),
    ):
        with pytest.raises(UserError, match=told) as error:
            checkpoint_command(words)
        assert one_sentence(error)


def test_the_command_needs_no_engine_and_no_model(copied: Path) -> None:
    """As a user starts it. Progress of a quick read is not shown."""
    program = (
        "import atexit, sys; from scalora_dist.cli import main; "
        "atexit.register(lambda: print({'deepspeed', 'transformers', 'peft'} & set(sys.modules))); "
        "main(sys.argv[1:])"
    )
    flip(copied)
    words = [sys.executable, "-c", program, "checkpoint", str(copied)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=runs.REPOSITORY)
    assert done.returncode == 1 and done.stderr == ""
    assert "\n  DAMAGED " in done.stdout and done.stdout.endswith("\nset()\n")


def test_a_long_read_shows_its_progress(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stderr, and the bytes that are counted are those of all files."""
    monkeypatch.setattr(command, "SHOW_AFTER", 0.0)
    checkpoint_command([str(copied)])
    assert "reading:" in capsys.readouterr().err
    files = json.loads((copied / MANIFEST).read_text())["files"]
    read: list[int] = []
    assert faults(copied, files, list(files), read.append) == []
    assert sum(read) == sum(path.stat().st_size for path in copied.iterdir()) - (
        (copied / MANIFEST).stat().st_size
    )


def test_sizes() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536 * 2**20, 2**50)] == [
        *("0 bytes", "1023 bytes", "1.0 KiB", "1.5 GiB", "1024.0 TiB"),
    ]
    many: dict[str, FileRecord] = {
        f"{i}": {"bytes": 1024 * (1 + i % 2), "sha256": ""} for i in range(10)
    }
    assert listed(many) == ["10 files, 15.0 KiB, 1.0 KiB to 2.0 KiB each"]
    assert render([("a", ["1", "2"]), ("bcd", ["3"])]) == "  a    1\n       2\n  bcd  3"
