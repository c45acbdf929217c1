"""--torch_compile: the losses of eager blocks on each engine, with merges; what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import runs, tiny_models, tiny_runs
from tests.support.ranks import Ranks
from tests.support.workers import compiled

GetRanks = Callable[[int], Ranks]
CHECKPOINTING = {"gradient_checkpointing": True}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ here")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and texts of many lengths."""
    folder = tiny_models.save_task(tmp_path_factory.mktemp("lengths"))
    tiny_models.save_texts(folder, "abc ", longest=90, count=41)
    return folder


def losses(folder: Path) -> list[float]:
    """Of steps and of evaluations."""
    return [line["loss" if "loss" in line else "eval_loss"] for line in tiny_runs.lines(folder)]


@needs_compiler
@pytest.mark.heavy
@pytest.mark.parametrize(
    ("engine", "size", "others"),
    [
        ("local", 1, {}),
        ("local", 1, CHECKPOINTING),
        ("local", 1, {"method": "dora"}),
        ("local", 1, {"method": "lora-sb", "lora_alpha": None}),  # its start is not compiled
        ("zero2", 2, {}),
        ("fsdp", 2, CHECKPOINTING),
        ("fsdp", 2, {"method": "lora", "eval_steps": 0}),
    ],
)
def test_losses_are_those_of_eager_blocks(
    ranks: GetRanks, task: Path, tmp_path: Path, engine: str, size: int, others: dict[str, Any]
) -> None:
    """ScaLoRA merges into W before each step: compiled code must read W, and not a copy."""
    default = {"method": "scalora", "max_length": 96, "max_steps": 6, "save_steps": 0}
    folders = {mode: tmp_path / mode / "run" for mode in ("eager", "compiled")}
    for mode, folder in folders.items():
        folder.parent.mkdir()
        case = tiny_runs.steady(task, folder, engine, **(default | others))
        if mode == "eager":
            ranks(size).run(runs.run, case)
            continue
        case["torch_compile"] = True
        counts = ranks(size).run(compiled.train, case, timeout=500)
    eager = losses(folders["eager"])
    assert len(eager) == 8 + (others.get("eval_steps") != 0)
    assert losses(folders["compiled"]) == pytest.approx(eager, rel=1e-5)
    # One graph without gradients, one for the first block, whose input needs none, and one for the
    # others, each at most for one length and then for all. PEFT's layers may break them.
    graphs, breaks, beyond = counts[0]
    assert 2 <= graphs <= 6 or others.get("method") == "dora"
    assert breaks == 0 or others.get("method") == "dora"
    assert not beyond


@needs_compiler
@pytest.mark.heavy
def test_a_resumed_run_goes_on_as_if_never_stopped(
    ranks: GetRanks, task: Path, tmp_path: Path
) -> None:
    case = tiny_runs.steady(task, tmp_path / "run", "local", torch_compile=True)
    ranks(1).run(compiled.train, case, timeout=500)
    resumed = case | {
        "output_dir": tmp_path / "resumed",
        "resume_from_checkpoint": tmp_path / "run/checkpoint-4",
    }
    ranks(1).run(compiled.train, resumed, timeout=500)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "run")


@pytest.mark.parametrize(
    ("engine", "others", "word"),
    [
        ("zero3", {}, "ZeRO-3"),
        ("local", {"merge_target": "carry"}, "carry"),
        ("local", {"method": "lora", "load_in_4bit": True}, "4-bit"),
    ],
)
def test_refused(
    ranks: GetRanks, task: Path, tmp_path: Path, engine: str, others: dict[str, Any], word: str
) -> None:
    case = tiny_runs.options(task, tmp_path / "run", engine, torch_compile=True, **others)
    ((sentence, status, _),) = ranks(1).run(tiny_runs.refusal, case)
    assert status == 2 and "--torch_compile" in sentence and word in sentence


def test_a_machine_without_a_compiler(ranks: GetRanks, task: Path, tmp_path: Path) -> None:
    case = tiny_runs.options(task, tmp_path / "run", "local", torch_compile=True)
    ((sentence, status, _),) = ranks(1).run(compiled.refused_without_compiler, case)
    assert status == 2 and "g++" in sentence
