"""Counts of a step on a fake GPU, against small models, and what a plan takes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scalora_dist.config.options import Options
from scalora_dist.config.parser import parse_options
from scalora_dist.modeling.load import read_base_model
from scalora_dist.planning.arguments import PlanArguments
from scalora_dist.planning.launches import BESIDE_MERGES, LAUNCH_SECONDS
from scalora_dist.planning.least_times import least_times_of
from scalora_dist.planning.planner import Planner
from scalora_dist.planning.traced_model import trace_frozen_model, trace_model
from scalora_dist.profiling.kernels import Counts
from scalora_dist.training.resolve import resolve
from tests.support import runs, tiny_runs
from tests.support.tiny_models import save_task
from tools.fake_gpu.counts import (
    method_counts,
    optimizer_counts,
    sharding_of,
)

SHAPES = [(48, 32), (32, 32), (25, 32)]
SHARDINGS = {"local": "local", "zero0": "local", "zero2": "zero1", "zero3": "zero3", "fsdp": "fsdp"}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_task(tmp_path_factory.mktemp("counted"))


def options_of(task: Path, tmp_path: Path, engine: str, world: int, **others: Any) -> Options:
    given = {"train_batch_size": 3 * world, "lora_dropout": 0.0} | others
    options = parse_options(runs.words(tiny_runs.options(task, tmp_path / "run", engine, **given)))
    base = read_base_model(options.model, options.train.dtype, torch.device("meta"))
    return resolve(options, world, base)


@pytest.mark.parametrize("engine", SHARDINGS)
def test_a_rescale_and_a_step_of_each_engine(task: Path, tmp_path: Path, engine: str) -> None:
    world = 1 if engine == "local" else 8
    options = options_of(task, tmp_path, engine, world)
    assert sharding_of(options) == SHARDINGS[engine]
    parts = method_counts(options, SHAPES, world)
    assert set(parts) >= {"grams", "solve", "gather", "merge", "scale"}
    assert all(parts[name].total > 0 for name in ("grams", "merge", "scale"))
    assert sum(counts.waits for counts in parts.values()) == 2
    shares = sum(counts.collective_bytes for counts in parts.values())
    assert (shares > 0) == bool(sum(map(sum, (c.collectives.values() for c in parts.values()))))
    assert 0 < optimizer_counts(options, SHAPES, world).total < 40


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"method": "lora"}, set()),
        ({"method": "lora-pro"}, {"grams", "solve", "mix"}),
        ({"method": "relora", "relora_interval": 2}, {"gather", "merge", "factors"}),
        ({"merge_target": "carry"}, {"grams", "solve", "gather", "merge", "scale"}),
    ],
)
def test_other_methods(
    task: Path, tmp_path: Path, settings: dict[str, Any], parts: set[str]
) -> None:
    options = options_of(task, tmp_path, "fsdp", 8, **settings)
    assert set(method_counts(options, SHAPES, 8)) == parts
    assert method_counts(options, [], 8) == {}


def products(counts: Counts) -> int:
    return sum(counts.kernels[f"aten.{name}"] for name in ("mm", "addmm", "addmm_"))


def test_the_adapters_kernels_are_those_that_the_frozen_model_has_not(
    task: Path, tmp_path: Path
) -> None:
    options = options_of(task, tmp_path, "local", 1)
    base = read_base_model(options.model, torch.float32, torch.device("meta"))
    traced = trace_model(options, base, torch.float32)
    frozen = trace_frozen_model(options, base, torch.float32).kernels
    added = traced.trace.kernels - frozen
    layers = len(traced.shapes)
    assert products(frozen) >= 2 * layers  # W in forward and backward
    # Two each of the forward and of the gradients of x, A and B. The embeddings are frozen: q, k
    # and v of the first block need no gradient of x, neither through W nor through A and B.
    assert products(added) == 6 * layers - 2 * 3
    assert traced.trace.kernels.waits == 0 and added.read > 0


def test_a_plan_takes_the_counts(task: Path, tmp_path: Path) -> None:
    """Of the optimizer exactly; of a rescale no more than the walk counts."""
    where = PlanArguments(nodes=1, gpus_per_node=2)
    words = runs.words(tiny_runs.options(task, tmp_path / "run", "zero3", train_batch_size=12))
    planner = Planner(parse_options(words), where)
    plan = planner.plan(planner.options, 2)
    options = plan.options
    base = read_base_model(options.model, options.train.dtype, torch.device("meta"))
    traced = trace_model(options, base, torch.float32)
    step = optimizer_counts(options, traced.shapes, 2).total
    assert options.train.gradient_accumulation_steps == 2
    assert plan.launches == 2 * traced.trace.kernels.total + step
    rescale = sum(counts.total for counts in method_counts(options, traced.shapes, 2).values())
    assert len(traced.shapes) + BESIDE_MERGES == plan.rescale_launches <= rescale
    times = least_times_of(plan, where)
    assert times.launches == pytest.approx(LAUNCH_SECONDS * plan.launches)
    assert times.step >= times.launches
    alone = planner.options.having(torch_compile=True, ds_config=None)
    compiled = planner.plan(alone, 1)
    assert compiled.launches < 100 < plan.launches
