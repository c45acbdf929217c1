"""Losses, gradient norms and rules are those that were recorded: a change of numbers is seen here.

`tests/assets/trajectories/` holds one file per engine, by `tools/loss_compare.py`. A change that is
to change numbers records them again, and says by how much and why:

    python tools/loss_compare.py . --trajectories tests/assets/trajectories
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import set_ups
from tests.support.ranks import Ranks
from tests.support.set_ups import SET_UPS
from tools import loss_compare
from tools.loss_compare import SetUp

TRAJECTORIES = Path(__file__).parents[1] / "assets" / "trajectories"
# Relative, of a loss or a norm. Another processor or library sums in another order.
TOLERANCE = {"fp32": 1e-4, "16 bits": 0.03}
NUMBERS = ("loss", "grad_norm", "grad_norm_before", "learning_rate", "eval_loss")
RULES = ("skipped", "column", "scalar", "nnls", "kept")
# Layers of a step that may take another rule: rounding decides a close case.
LAYERS_ASTRAY = {"fp32": 1, "16 bits": 2}
# One set-up of each class, and every kind of method once. The others are heavy.
EVERY_DAY = {
    *("local-scalora", "local-nnls", "local-lora", "local-lora-sb", "local-dora", "local-full"),
    *("zero1-scalora-bf16", "zero2-scalora-fp16", "zero3-scalora", "zero3-scalora-bf16"),
    *("zero3-4bit", "zero3-lora-pro", "zero3-saves-resumed", "fsdp-scalora", "fsdp-scalora-bf16"),
    *("fsdp-auto", "fsdp-carry", "fsdp-relora", "fsdp-lora-xs"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("inputs")
    loss_compare.make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def train(
    ranks: Callable[[int], Ranks], inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[SetUp], Path]:
    """``train(set_up)``: the folder of its run, which is made once."""
    results: Path = tmp_path_factory.mktemp("results")

    return lambda set_up: set_ups.train(ranks, set_up, inputs, results)


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[] if x in EVERY_DAY else pytest.mark.heavy) for x in SET_UPS],
)
def test_the_numbers_are_those_recorded(train: Callable[[SetUp], Path], name: str) -> None:
    set_up = SET_UPS[name]
    before = json.loads((TRAJECTORIES / f"{set_up.engine}.json").read_text())[name]
    found = loss_compare.read_results(train(set_up))
    recorded, lines = before["lines"], found["lines"]
    assert found["summary"]["update_rank"] == before["summary"]["update_rank"]
    dtype = "16 bits" if {"bf16", "fp16"} & set(set_up.words) else "fp32"
    assert [line["step"] for line in lines] == [line["step"] for line in recorded]
    for line, then in zip(lines, recorded, strict=True):
        assert line.keys() == then.keys()
        assert line.get("tokens") == then.get("tokens")
        for key in line.keys() & set(NUMBERS):
            same = then[key]
            if same is not None:  # a skipped step has no norm
                same = pytest.approx(same, rel=TOLERANCE[dtype])
            assert line[key] == same, (line, then)
        rules, taken = (x.get("rescale", {}) for x in (line, then))
        astray = sum(abs(rules.get(rule, 0) - taken.get(rule, 0)) for rule in RULES) // 2
        assert astray <= LAYERS_ASTRAY[dtype], (line, then)


def test_every_set_up_has_a_trajectory() -> None:
    recorded = [json.loads(path.read_text()) for path in TRAJECTORIES.glob("*.json")]
    assert {name for names in recorded for name in names} == set(SET_UPS) >= EVERY_DAY
