"""``--scaling_interval auto``: layers whose scales hardly moved are left alone, others are not."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.layout import Layout
from scalora_dist.core.scale_solver import Rule, Scales
from scalora_dist.engines.layer_shards import LayerShards, factor_shards
from scalora_dist.methods.scalora import scale_factors_
from tests.support import runs, tiny_models, tiny_runs, toy
from tests.support.reference import State, transform

EVERYWHERE = [
    (1, "local"),
    *((2, engine) for engine in ("zero3", "fsdp")),
    pytest.param(2, "zero2", marks=pytest.mark.heavy),
    *(pytest.param(3, engine, marks=pytest.mark.heavy) for engine in ("zero2", "zero3", "fsdp")),
]
STEPS = 6
# Within six steps of the toy, layers are on either side of it, each alone and both together, and
# none is near.
THRESHOLD = 0.6
FIELDS = [field.name for field in fields(State)]


def moves(record: dict[str, Any]) -> np.ndarray:
    """The largest |ln α| or |ln β| of each layer, as solved."""
    return np.abs(np.log(np.concatenate(record["scales"], axis=1))).max(axis=1)


def same_bits(one: State, other: State) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


@pytest.fixture(scope="module")
def decided_alone(ranks: Any) -> list[list[bool]]:
    """For each step whether each layer moved, in one process."""
    records = ranks(1).run(toy.steps, STEPS, engine="local", threshold=THRESHOLD)[0]
    return [list(moves(record) > THRESHOLD) for record in records]


@pytest.mark.parametrize(("world", "engine"), EVERYWHERE)
def test_what_moved_is_merged_and_the_rest_is_left_as_it_was(
    ranks: Any, decided_alone: list[list[bool]], world: int, engine: str
) -> None:
    answers = ranks(world).run(toy.steps, STEPS, engine=engine, threshold=THRESHOLD)
    for records in answers:
        assert [list(moves(record) > THRESHOLD) for record in records] == decided_alone
    assert {tuple(moved) for moved in decided_alone} >= {(False, False), (False, True)}
    assert [True, True] in decided_alone
    for records in answers:
        assert len(records) == STEPS
        for record, moved in zip(records, decided_alone, strict=True):
            check_step(record, moved)


def check_step(record: dict[str, Any], moved: list[bool]) -> None:
    assert record["applied"]
    counts = record["report"].details
    assert counts["kept"] == moved.count(False)
    assert sum(counts.values()) == len(moved) and counts["skipped"] == 0
    gradients = []
    for name, alpha, beta, merged in zip(toy.SHAPES, *record["scales"], moved, strict=True):
        before, after = record["before"][name], record["after"][name]
        assert same_bits(before, after) != merged
        if merged:
            expected = transform(before, alpha, beta, toy.SCALING)
            assert expected.largest_error(after) < 1e-5
        gradients += [after.grad_A, after.grad_B]
    norm = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients))
    assert record["report"].grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(("world", "engine"), [(1, "local"), (2, "zero3"), (2, "fsdp")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_merge_beside_a_kept_layer_is_the_usual_one(
    ranks: Any, world: int, engine: str, dtype: str
) -> None:
    """At the first step, where a run with a threshold and one without begin alike."""
    case = {"engine": engine, "dtype": dtype}
    always = ranks(world).run(toy.steps, 1, **case)[0][0]
    low, high = sorted(moves(always))
    auto = ranks(world).run(toy.steps, 1, threshold=(low + high) / 2, **case)[0][0]
    assert all(map(np.array_equal, auto["scales"], always["scales"]))
    kept, merged = (list(toy.SHAPES)[i] for i in np.argsort(moves(always)))
    assert auto["report"].details["kept"] == 1 and always["report"].details["kept"] == 0
    assert same_bits(auto["after"][merged], always["after"][merged])
    assert same_bits(auto["after"][kept], auto["before"][kept])
    assert same_bits(auto["before"][kept], always["before"][kept])
    assert not same_bits(always["after"][kept], always["before"][kept])


# --- through the trainer -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


def train(ranks: Any, task: Path, folder: Path, engine: str, **others: Any) -> list[dict[str, Any]]:
    """Six steps without dropout; the records of the steps."""
    given = {"lora_dropout": 0.0, "per_device_train_batch_size": 6}
    case = tiny_runs.options(task, folder, engine, max_steps=STEPS, save_steps=0, **given, **others)
    ranks(1 if engine == "local" else 2).run(tiny_runs.train, case)
    return [line for line in tiny_runs.lines(folder) if "loss" in line]


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_a_run_counts_what_it_merged_and_kept(
    ranks: Any, task: Path, tmp_path: Path, engine: str
) -> None:
    auto = {"scaling_interval": "auto", "auto_threshold": 0.7}
    records = train(ranks, task, tmp_path / "run", engine, **auto)
    counts = [record["rescale"] for record in records]
    print(counts)
    layers = {sum(count[rule.name.lower()] for rule in Rule) for count in counts}
    assert layers == {14}
    kept = [count["kept"] for count in counts]
    assert any(0 < number < 14 for number in kept)
    alone = train(ranks, task, tmp_path / "alone", "local", **auto)
    assert [record["rescale"]["kept"] for record in alone] == kept


def test_the_ends_of_the_threshold(ranks: Any, task: Path, tmp_path: Path) -> None:
    """So large that nothing is merged: LoRA. So small that all is: an interval of 1."""
    auto: dict[str, Any] = {"scaling_interval": "auto"}
    runs_made = {
        name: train(ranks, task, tmp_path / name, "fsdp", **others)
        for name, others in {
            "never": auto | {"auto_threshold": 1e6},
            "lora": {"method": "lora"},
            "always": auto | {"auto_threshold": 1e-12},
            "each_step": {"scaling_interval": "1"},
        }.items()
    }
    losses = {name: runs.losses(tmp_path / name) for name in runs_made}
    assert all(record["rescale"]["kept"] == 14 for record in runs_made["never"])
    assert losses["never"] == losses["lora"]
    assert runs_made["always"] == runs_made["each_step"]
    assert losses["always"] != losses["lora"]


# --- moments -------------------------------------------------------------------------------------


def moments(A: Tensor, B: Tensor, gradients: Tensor, scaling: float) -> list[Tensor]:
    """torch's m and v of A and B after steps of lr 0 on the gradients of W (steps, m, n)."""
    factors = [torch.nn.Parameter(factor.clone()) for factor in (A, B)]
    optimizer = torch.optim.AdamW(factors, lr=0.0, weight_decay=0.0)
    for G in gradients:
        factors[0].grad, factors[1].grad = scaling * G @ B, scaling * G.T @ A
        optimizer.step()
    states = [optimizer.state[factor] for factor in factors]
    return [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]


def test_the_transfer_of_moments_is_exact() -> None:
    """As if all steps had been taken with the scaled factors, to rounding, in float64."""
    generator = torch.Generator().manual_seed(0)
    rows, cols, rank, scaling = 7, 5, 3, 2.0

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A, B, gradients = draw(rows, rank), draw(cols, rank), draw(4, rows, cols)
    alpha, beta = draw(1, rank).exp(), draw(1, rank).exp()

    def shard(matrix: Tensor) -> FlatShard:
        return FlatShard(matrix.clone().view(-1), 0, (matrix.shape[0], matrix.shape[1]))

    old = [shard(moment) for moment in moments(A, B, gradients, scaling)]
    layer = LayerShards(
        name="layer",
        scaling=scaling,
        W=shard(draw(rows, cols)),
        A=shard(A),
        B=shard(B),
        grad_A=shard(scaling * gradients[-1] @ B),
        grad_B=shard(scaling * gradients[-1].T @ A),
        moments_A=(old[0], old[1]),
        moments_B=(old[2], old[3]),
    )
    scales = Scales(alpha, beta, torch.tensor([int(Rule.COLUMN)]))
    scale_factors_([layer], scales, Layout.of(factor_shards([layer])))
    scaled_A, scaled_B = A * alpha, B * beta
    new = [scaled_A, scaled_B, scaling * gradients[-1] @ scaled_B]
    new += [scaling * gradients[-1].T @ scaled_A, *moments(scaled_A, scaled_B, gradients, scaling)]
    transferred = [layer.A, layer.B, layer.grad_A, layer.grad_B, *old]
    for ours, expected in zip(transferred, new, strict=True):
        assert torch.allclose(ours.local.view_as(expected), expected, rtol=1e-13, atol=1e-15)
    # α and β differ: had they been confused, this would have failed.
    wrong = moments(A * beta, B * alpha, gradients, scaling)
    assert not torch.allclose(old[0].local.view_as(wrong[0]), wrong[0], rtol=0.1)
