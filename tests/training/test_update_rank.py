"""The rank of the update at the end of a run, for which no rank keeps initial weights."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from scalora_dist.core.rank_sketch import numerical_rank
from scalora_dist.distributed.world import World
from scalora_dist.profiling.live import LiveBytes, living_tensors
from scalora_dist.training.update_rank import UpdateRank
from tests.support import runs, tiny_models, tiny_runs

heavy = partial(pytest.param, marks=pytest.mark.heavy)
FULL: dict[str, Any] = {"method": "full", "rank": None, "lora_alpha": None, "lora_dropout": None}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


def measured(world: World, case: dict[str, Any]) -> tuple[list[int], list[str], int]:
    """Train. Returns the ranks, the names of the weights, and the bytes that were kept for them."""
    trainer = runs.make(world, case)
    before = held()
    again = UpdateRank(trainer.runner, trainer.options, trainer.options.model)
    kept = held() - before
    return trainer.run()["update_rank"], again.weights, kept


def held() -> int:
    """Bytes of all tensors with values."""
    gc.collect()
    return LiveBytes(existing=living_tensors()).now


@pytest.mark.parametrize(
    ("engine", "size", "others"),
    [
        ("local", 1, {}),
        ("zero3", 2, {}),
        ("fsdp", 2, FULL),
        heavy("zero2", 2, {}),
        heavy("zero3", 2, FULL),
        heavy("local", 1, {"method": "lora"}),
        heavy("fsdp", 2, {"merge_target": "carry"}),
        heavy("local", 1, {"method": "pissa", "lora_dropout": None}),
    ],
)
def test_it_is_that_of_the_models_difference_and_no_weight_is_kept(
    ranks: Any, task: Path, tmp_path: Path, engine: str, size: int, others: dict[str, Any]
) -> None:
    settings = {"max_steps": 3, "eval_size": 0, "save_steps": 0, "save_model": True}
    settings |= {"update_rank_layers": 5}
    case = tiny_runs.options(task, tmp_path / "run", engine, **(settings | others))
    found = ranks(size).run(measured, case)
    update_rank, names, _ = found[0]
    before = load_file(task / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert len(names) == 5
    assert update_rank == [numerical_rank(after[name] - before[name]) for name in names]
    assert all(kept == 0 for _, _, kept in found)


def without_base(world: World, case: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Train while the base model's files are away. Returns the ranks, and the warnings."""
    with tiny_runs.warnings_of() as warnings:
        trainer = runs.make(world, case)
        files, away = weights_of(case), weights_of(case).with_suffix(".away")
        world.main_only(lambda: files.rename(away))
        options = trainer.options
        trainer.results.update_rank = UpdateRank(trainer.runner, options, options.model)
        try:
            summary = trainer.run()
        finally:
            world.main_only(lambda: away.rename(files))
    return summary["update_rank"], warnings


def weights_of(case: dict[str, Any]) -> Path:
    return Path(case["model_name_or_path"]) / "model.safetensors"


def test_a_base_that_cannot_be_read_again_leaves_the_rank_out(
    ranks: Any, task: Path, tmp_path: Path
) -> None:
    """A run does not end for that. LoRA needs no base."""
    settings = {"update_rank_layers": 2, "max_steps": 1, "eval_size": 0, "save_steps": 0}
    case = tiny_runs.options(task, tmp_path / "run", "zero3", **settings)
    for found, said in ranks(2).run(without_base, case):
        assert found == []
        left_out = [line for line in said if "the rank of the update is left out" in line]
        assert len(left_out) == 1 and "model.safetensors" in left_out[0]
    lora = {"method": "lora", "output_dir": tmp_path / "lora"}
    for found, said in ranks(2).run(without_base, case | lora):
        assert len(found) == 2
        assert not [line for line in said if "the rank of the update" in line]
