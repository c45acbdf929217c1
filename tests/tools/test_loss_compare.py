"""Two commits are compared digit by digit, and a difference ends with status 1."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import set_ups
from tests.support.ranks import Ranks
from tests.support.set_ups import SET_UPS
from tools import loss_compare

RECORDED = {
    "local-lora": {
        "lines": [{"step": 1, "loss": 5.5, "rescale": {"column": 3}}, {"step": 2, "loss": 5.25}],
        "summary": {"update_rank": [4, 4]},
    }
}


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["loss_compare.py", *map(str, words)])
    return loss_compare.main()


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda x: x["lines"][1].update(loss=5.250000000000001), "lines.1.loss"),
        (lambda x: x["lines"][0]["rescale"].update(column=2, scalar=1), "lines.0.rescale.column"),
        (lambda x: x["lines"].append({"step": 3, "loss": 5.0}), "lines.2.step"),
        (lambda x: x["summary"].pop("update_rank"), "summary.update_rank.0"),
    ],
)
def test_the_last_digit_counts(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    change: Any,
    place: str,
) -> None:
    changed = copy.deepcopy(RECORDED)
    change(changed["local-lora"])
    for name, results in (("before", RECORDED), ("after", changed)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    assert run(monkeypatch, before, before, "--only=local-lora") == 1  # the others took no step
    text = capsys.readouterr().out
    assert "equal, 2 steps" in text and "local-lora-sb" in text
    assert run(monkeypatch, before, after, "--only=local-lora") == 1
    assert f"first at {place}" in capsys.readouterr().out


@pytest.mark.heavy
def test_the_working_tree_repeats_what_other_ranks_computed(
    ranks: Callable[[int], Ranks],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The tool starts it as a user does, on two ranks, with a resume."""
    inputs, before, after = (tmp_path / name for name in ("inputs", "before.json", "after.json"))
    loss_compare.make_inputs(inputs)
    recorded = {}
    for name in ("fsdp-saves", "fsdp-saves-resumed"):
        folder = set_ups.train(ranks, SET_UPS[name], inputs, tmp_path / "results")
        recorded[name] = loss_compare.read_results(folder)
    before.write_text(json.dumps(recorded))
    assert run(monkeypatch, before, ".", "--only=fsdp-saves", "--save", after) == 0
    assert "2 set-ups, 12 steps" in capsys.readouterr().out
    assert json.loads(after.read_text()) == recorded
    assert run(monkeypatch, after, "--only=fsdp-saves") == 0
    assert "2 set-ups recorded" in capsys.readouterr().out
