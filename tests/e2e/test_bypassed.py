"""Mamba, which multiplies the weights of some layers itself: what of it is trained, and left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support import tiny_models, tiny_runs
from tests.support.ranks import Ranks
from tests.support.workers import adapter as work

GetRanks = Callable[[int], Ranks]
HEAVY = pytest.mark.heavy


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("mamba")
    tiny_models.save_tiny_mamba(folder)
    return folder


@pytest.mark.parametrize(
    ("engine", "others"),
    [
        ("local", {"method": "lora"}),
        ("zero3", {"method": "lora"}),
        ("fsdp", {"method": "lora"}),
        pytest.param("zero3", {"adapter_rank": 16}, marks=HEAVY),
        pytest.param("fsdp", {"adapter_rank": 16}, marks=HEAVY),
        pytest.param("zero2", {"method": "lora"}, marks=HEAVY),
        pytest.param("fsdp", {"method": "lora", "gradient_checkpointing": True}, marks=HEAVY),
    ],
)
def test_all_that_is_adapted_is_trained_and_loads(
    ranks: GetRanks, mamba: Path, tmp_path: Path, engine: str, others: dict[str, Any]
) -> None:
    """PEFT, which refuses an out_proj, loads the adapter, and its logits are the run's."""
    run = tmp_path / "run"
    case = work.options(mamba, run, engine, **{"lora_dropout": 0.0} | others)
    trained = ranks(work.size(engine)).run(work.train, case)[0]
    assert work.config(run)["target_modules"] == ["in_proj"]
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    factors = [x for name, x in tensors.items() if "lora_B" in name]
    assert len(factors) == 2 and all(x.abs().min() > 0 for x in factors)
    assert work.differ(trained, work.logits(work.base(mamba))) > 2e-3
    assert work.differ(work.by_peft(mamba, run), trained) < 1e-3


@pytest.mark.parametrize(
    "engine",
    ["local", pytest.param("zero3", marks=HEAVY), pytest.param("fsdp", marks=HEAVY)],
)
def test_pefts_layers_leave_them_out_too(
    ranks: GetRanks, mamba: Path, tmp_path: Path, engine: str
) -> None:
    run = tmp_path / "run"
    case = work.options(mamba, run, engine, method="dora", save_model=True)
    ranks(work.size(engine)).run(tiny_runs.train, case)
    before, after = work.base(mamba).state_dict(), work.base(run / "model").state_dict()
    changed = {name for name, x in before.items() if (after[name] - x).abs().max() > 1e-4}
    assert changed == {f"backbone.layers.{i}.mixer.in_proj.weight" for i in "01"}


def test_all_linear_warns_once(ranks: GetRanks, mamba: Path, tmp_path: Path) -> None:
    case = work.options(mamba, tmp_path / "run", method="lora", max_steps=1)
    ((_, _, warned),) = ranks(1).run(tiny_runs.train, case)
    (line,) = [line for line in warned if "leaves out" in line]
    assert all(f"layers.{i}.mixer.{name}" in line for i in "01" for name in ("x_proj", "out_proj"))


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"target_modules": "in_proj dt_proj"}, "dt_proj is bypassed"),
        ({"target_modules": "out_proj", "method": "dora"}, "out_proj is bypassed"),
        ({"load_in_4bit": True}, "load the model unquantized"),
    ],
)
def test_by_name_or_in_four_bits_they_are_refused(
    ranks: GetRanks, mamba: Path, tmp_path: Path, others: dict[str, Any], expected: str
) -> None:
    case = work.options(mamba, tmp_path / "run", **{"method": "lora"} | others)
    ((sentence, status, _),) = ranks(1).run(tiny_runs.refusal, case)
    assert status == 2 and expected in sentence and "\n" not in sentence
