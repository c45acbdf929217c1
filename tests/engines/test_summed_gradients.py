"""Gradients of many micro-batches in 16 bits: on which engines their sums are those of fp32."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import tiny_models, tiny_runs
from tests.support.ranks import Ranks
from tests.support.workers.summed_gradients import Found, gradients

GetRanks = Callable[[int], Ranks]

ACCUMULATION = 64  # micro-batches of one example, on each rank
TOLERANCE = 1e-5  # of the norm of a layer's ∇A or ∇B
EVERY_DAY = [(1, "zero3"), (2, "zero2"), (2, "zero3"), (2, "fsdp")]
NOW_AND_THEN = [(2, "zero3_offload"), (4, "zero3"), (4, "fsdp")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("summed")
    tiny_models.save_odd_model(folder, "llama")
    tiny_models.save_texts(folder, string.ascii_letters, longest=32, count=300)
    return folder


def case(
    model: Path, output: Path, engine: str, accumulation: int, **others: Any
) -> dict[str, Any]:
    alone = {"train_batch_size": None, "eval_size": None, "lora_dropout": 0.0, "max_length": 32}
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation}
    options = alone | sizes | {"max_steps": 1, "bf16": True} | others
    return tiny_runs.options(model, output / "run", engine, **options)


@pytest.fixture(scope="module")
def one_process(
    ranks: GetRanks, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Found]:
    """``one_process(size)``: bf16 gradients of ``size`` ranks' global batch without an engine."""
    made: dict[int, Found] = {}

    def get(size: int) -> Found:
        if size not in made:
            folder = tmp_path_factory.mktemp("reference")
            alone = case(model, folder, "local", ACCUMULATION * size)
            (made[size],) = ranks(1).run(gradients, alone)
        return made[size]

    return get


def largest(found: Found, expected: Found) -> float:
    """The largest error of a layer's ∇A or ∇B, relative to its norm."""
    assert found.whole.keys() == expected.whole.keys()
    errors = {
        name: np.linalg.norm(found.whole[name] - whole) / np.linalg.norm(whole)
        for name, whole in expected.whole.items()
    }
    return float(max(errors.values()))


@pytest.mark.parametrize(
    ("size", "engine"),
    [*EVERY_DAY, *(pytest.param(*case, marks=pytest.mark.heavy) for case in NOW_AND_THEN)],
)
def test_bf16_gradients_are_summed_in_fp32(
    ranks: GetRanks,
    model: Path,
    one_process: Callable[[int], Found],
    tmp_path: Path,
    size: int,
    engine: str,
) -> None:
    found = ranks(size).run(gradients, case(model, tmp_path, engine, ACCUMULATION))
    error = largest(found[0], one_process(size))
    print(f"{engine}, {size} rank(s): {error:.1e}")
    assert all(rank.dtypes == {torch.float32} for rank in found)
    assert found[0].frozen == {torch.bfloat16}
    assert error < TOLERANCE


@pytest.mark.parametrize("engine", [pytest.param("zero0", marks=pytest.mark.heavy), "zero1"])
def test_stages_0_and_1_sum_in_bf16(
    ranks: GetRanks,
    model: Path,
    one_process: Callable[[int], Found],
    tmp_path: Path,
    engine: str,
) -> None:
    """What DeepSpeed does by itself at stages 2 and 3 too: the tests above would see it."""
    (found,) = ranks(1).run(gradients, case(model, tmp_path, engine, ACCUMULATION))
    assert found.dtypes == {torch.bfloat16}
    assert largest(found, one_process(1)) > 100 * TOLERANCE


def test_fp16_gradients_are_summed_in_fp32(ranks: GetRanks, model: Path, tmp_path: Path) -> None:
    """One process has no fp16. So two engines on different numbers of ranks are compared.

    Their losses differ by the factor 2. With a smaller loss scale, subnormal gradients round apart.
    """
    found = []
    for engine, size in (("zero2", 1), ("zero3", 2)):
        (tmp_path / engine).mkdir()
        fp16 = tiny_runs.fp16_options(engine, tmp_path / engine, initial_scale_power=12)
        options = case(model, tmp_path / engine, engine, 16 // size, **fp16, bf16=None)
        found.append(ranks(size).run(gradients, options)[0])
    assert all(x.dtypes == {torch.float32} and x.frozen == {torch.float16} for x in found)
    assert largest(*found) < TOLERANCE
