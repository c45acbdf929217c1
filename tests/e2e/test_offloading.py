"""--activation_offloading: the same losses bit for bit on each engine, and never a parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import runs, tiny_runs
from tests.support.ranks import Ranks
from tests.support.workers import offloading

CHECKPOINTING = {"gradient_checkpointing": True}
HEAVY = pytest.mark.heavy


@pytest.mark.parametrize(
    ("engine", "size", "others"),
    [
        ("zero3", 2, {}),
        ("fsdp", 2, {"bf16": True} | CHECKPOINTING),
        pytest.param("local", 1, {}, marks=HEAVY),
        pytest.param("local", 1, {"bf16": True} | CHECKPOINTING, marks=HEAVY),
        pytest.param("local", 1, {"merge_target": "carry"}, marks=HEAVY),
        pytest.param("zero2", 2, {"bf16": True}, marks=HEAVY),
        pytest.param("zero3", 2, {"bf16": True} | CHECKPOINTING, marks=HEAVY),
        pytest.param("zero3", 2, {"method": "dora"}, marks=HEAVY),
        pytest.param("zero3", 2, {"method": "hira", "lora_alpha": None}, marks=HEAVY),
        pytest.param("zero3", 2, {"method": "lora", "load_in_4bit": True}, marks=HEAVY),
        pytest.param("fsdp", 2, {"method": "full", "rank": None, "lora_alpha": None}, marks=HEAVY),
        pytest.param("fsdp", 2, {}, marks=HEAVY),
        pytest.param("hybrid", 4, CHECKPOINTING, marks=HEAVY),
    ],
)
def test_losses_are_the_same_bit_for_bit(
    ranks: Callable[[int], Ranks],
    odd: Path,
    tmp_path: Path,
    engine: str,
    size: int,
    others: dict[str, Any],
) -> None:
    """With dropout, whose mask is an activation, and with an evaluation between steps."""
    default: dict[str, Any] = {"max_steps": 2, "eval_steps": 1, "save_steps": 0}
    if others.get("method") == "full":
        default["lora_dropout"] = None
    folders = {mode: tmp_path / mode / "run" for mode in ("kept", "offloaded")}
    for mode, folder in folders.items():
        folder.parent.mkdir()
        case = tiny_runs.options(odd, folder, engine, **(default | others))
        if mode == "kept":
            ranks(size).run(runs.run, case)
        else:
            found = ranks(size).run(offloading.train, case | {"activation_offloading": True})
    assert tiny_runs.lines(folders["offloaded"]) == tiny_runs.lines(folders["kept"])
    for sent, of_parameters in found:
        assert sent > 0 and of_parameters == 0
