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
from scalora_dist.errors import UserError
from scalora_dist.profiling.live import LiveBytes, living_tensors
from scalora_dist.training.update_rank import UpdateRank
from tests.support import runs, tiny_models, tiny_runs
from tests.support.refusals import one_sentence

heavy = partial(pytest.param, marks=pytest.mark.heavy)
FULL: dict[str, Any] = {"method": "full", "rank": None, "lora_alpha": None, "lora_dropout": None}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


def measured(world: World, case: dict[str, Any]) -> tuple[list[int], list[str], int]:
    """Train. Returns the ranks, the names of the weights, and the bytes that were kept for them."""
    trainer = runs.make(world, case)
    before = held()
    again = UpdateRank(trainer.runner, trainer.options)
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


def refusal(world: World, case: dict[str, Any]) -> str:
    """What is said where the base model's files are gone once it is loaded. LoRA needs none."""
    trainer = runs.make(world, case)
    lora = runs.make(world, case | {"method": "lora"})
    world.main_only(lambda: weights_of(case).rename(weights_of(case).with_suffix(".away")))
    try:
        UpdateRank(lora.runner, lora.options)
        with pytest.raises(UserError) as error:
            UpdateRank(trainer.runner, trainer.options)
    finally:
        world.main_only(lambda: weights_of(case).with_suffix(".away").rename(weights_of(case)))
        trainer.close()
        lora.close()
    return one_sentence(error)


def weights_of(case: dict[str, Any]) -> Path:
    return Path(case["model_name_or_path"]) / "model.safetensors"


def test_a_base_that_cannot_be_read_again_is_refused_on_every_rank(
    ranks: Any, task: Path, tmp_path: Path
) -> None:
    case = tiny_runs.options(task, tmp_path / "run", "zero3", update_rank_layers=2, max_steps=1)
    for said in ranks(2).run(refusal, case):
        assert "is read again after training, and it has none of model.safetensors" in said
        assert said.endswith("or set --update_rank_layers 0")
