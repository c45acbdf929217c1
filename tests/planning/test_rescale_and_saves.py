"""What a plan says of a rescale's rows that ranks share, of full carries, and of saves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from scalora_dist.config.parser import parse_options
from scalora_dist.planning.arguments import PlanArguments, config_folder
from scalora_dist.planning.least_times import least_times_of
from scalora_dist.planning.plan import Plan
from scalora_dist.planning.planner import Planner
from scalora_dist.planning.staging import Part, host_bytes
from scalora_dist.planning.table import as_json, render
from tests.support.tiny_models import SIZES

ZERO3, ZERO2 = ["--ds_config", "zero3"], ["--ds_config", "zero2"]
FSDP = ["--fsdp"]
WHERE = PlanArguments()
heavy = partial(pytest.param, marks=pytest.mark.heavy)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(**SIZES | {"hidden_size": 20, "num_key_value_heads": 2}).save_pretrained(folder)
    return folder


def plans_of(model: Path, *words: str, gpus: Sequence[int]) -> list[Plan]:
    """Plans of one run on so many GPUs each. They share a trace."""
    given = ["--model_name_or_path", str(model), "--max_length", "8", *words]
    if not {"full", "--rank"} & set(words):
        given += ["--rank", "4"]
    options = parse_options([*given, "--output_dir", "."])
    planner = Planner(options, WHERE)
    return [planner.plan(options, size) for size in gpus]


def plan_of(model: Path, *words: str, gpus: int = 4) -> Plan:
    (plan,) = plans_of(model, *words, gpus=[gpus])
    return plan


def received(plan: Plan) -> dict[str, float]:
    return {message.what: message.received for message in plan.rescale}


@pytest.mark.parametrize(
    ("words", "gpus", "rows"),
    [
        # A and B have 20 and 24 rows. Of 20 × 4 elements each of 3 ranks has 27: two rows are cut,
        # and the middle rank has a part of both. 24 rows are 8 for each.
        (ZERO3, 3, 2 * (4 * 2 + 3)),
        heavy(ZERO3, 4, 0),
        (FSDP, 3, 0),
    ],
)
def test_rows_at_the_borders_of_ranges_go_to_the_neighbours(
    model: Path, words: list[str], gpus: int, rows: int
) -> None:
    plan = plan_of(model, *words, gpus=gpus)
    width = 2 * 4  # columns of a factor, and of its gradient
    layers = 2  # blocks
    assert received(plan).get("split rows", 0) == 8 * width * layers * rows
    (grams,) = [moment for moment in plan.phases if moment.phase == "grams"]
    held = 8 * width * layers * 2 * 14  # the first and the last row of each factor
    assert grams.parts["split rows"] == (held + max(held, 16 * width * layers * rows)) * (rows > 0)


def test_a_full_carry_is_compressed_beside_what_the_rank_keeps(model: Path) -> None:
    """Only with a carry. Where each rank has whole carries, their grams are not sent."""
    carry = ["--merge_target", "carry", "--carry_rank", "4", "--carry_room", "8"]
    plans = {name: plan_of(model, *words, *carry) for name, words in (("3", ZERO3), ("2", ZERO2))}
    for plan in plans.values():
        (full,) = [moment for moment in plan.phases if moment.phase == "compression"]
        assert full.total > sum(plan.held.device.values())
        assert full.parts["carry's grams"] >= 2 * 8 * 28 * 12**2
    assert received(plans["3"])["grams of a carry"] == 2 * 0.75 * 8 * 28 * 12**2
    assert "grams of a carry" not in received(plans["2"])
    phases = [moment.phase for moment in plan_of(model, *ZERO3).phases]
    assert phases == ["forward", "backward", "grams", "merge", "optimizer"]


@pytest.mark.parametrize(
    ("engine", "words", "each"),
    [
        (ZERO3, ["--bf16"], 2 + 2),  # W and its low halves
        (ZERO2, ["--method", "lora"], 0),
        (FSDP, [], 4),
        heavy(ZERO2, ["--bf16"], 2 + 2),
        heavy(FSDP, ["--bf16"], 2 + 2),
        heavy(FSDP, ["--method", "lora"], 0),
        heavy(ZERO3, ["--bf16", "--merge_rounding", "nearest"], 2),
        heavy(ZERO2, ["--method", "pissa"], 4),
        *(heavy(engine, ["--method", "full"], 12) for engine in (ZERO2, ZERO3, FSDP)),
    ],
)
def test_the_ranks_of_a_save_share_the_copies(
    model: Path, engine: list[str], words: list[str], each: int
) -> None:
    two, four = plans_of(model, *engine, *words, gpus=[2, 4])
    adapted = 2 * (4 * 20 * 20 + 3 * 20 * 24)
    trained = 0 if "full" in words else 12 * four.trained
    if "full" in words:
        adapted = four.trained
    random = (4 * four.staged - 2 * two.staged) / 2  # each rank has its own states
    saved = 2 * two.staged - 2 * random
    assert 10_000 < random < 20_000
    assert saved == pytest.approx(each * adapted + trained, rel=0.01)


def test_pinned_copies_take_powers_of_two(model: Path) -> None:
    assert (
        host_bytes([Part(3, True), Part(4, True), Part(5, True), Part(5, False)]) == 4 + 4 + 8 + 5
    )
    plan = plan_of(model, *ZERO3)
    assert plan.staged < plan.held.host["a checkpoint on its way"] < 2 * plan.staged
    away = plan_of(model, "--ds_config", "zero3_offload")  # copied from the host
    assert away.held.host["a checkpoint on its way"] == away.staged


@pytest.mark.parametrize("words", [heavy(ZERO3), ["--ds_config", "zero3_offload"]])
def test_the_hosts_memory_is_shown_by_part(model: Path, words: list[str]) -> None:
    plan = plan_of(model, *words)
    times = least_times_of(plan, WHERE)
    text = render(plan, times, WHERE)
    assert "MiB of the host for each GPU" in text and "a checkpoint on its way" in text
    found: dict[str, Any] = as_json(plan, times, fits=True)
    assert found["host_bytes"] == sum(found["host"].values()) > 0
    assert ("moments" in found["host"]) == ("zero3_offload" in words)


@pytest.mark.heavy
def test_gemma_3_12b_has_them_all() -> None:
    """In 4 bits on 3 nodes: 3840 · 8 elements are no whole rows for each of 24 ranks."""
    gemma = Path(config_folder("google/gemma-3-12b-pt"))
    words = [*ZERO3, "--bf16", "--load_in_4bit", "--gradient_checkpointing"]
    eight, many = plans_of(gemma, *words, "--rank", "8", gpus=[8, 24])
    assert received(many)["split rows"] > 0 == received(eight).get("split rows", 0)
    K = 56 + 32  # columns of the carry
    for plan in (eight, many):
        phases = {moment.phase: moment for moment in plan.phases}
        assert phases["compression"].parts["carry's columns"] > 2**25
        assert phases["compression"].total < phases["backward"].total
    # C, D and their low halves in 2 bytes each; A and B with two moments in 4 bytes.
    rows = eight.trained / 8
    copies = rows * (K * 4 + 8 * 12) / 8
    assert eight.staged == pytest.approx(copies, rel=0.001)
    assert copies < eight.held.host["a checkpoint on its way"] < 1.5 * copies
