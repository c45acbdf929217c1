"""The rescale on real ranks against the dense float64 reference."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.support import toy
from tests.support.reference import (
    State,
    adamw,
    adamw_scales,
    factor_gradients,
    relative_error,
    scales,
    transform,
)
from tests.support.toy import ENGINES, KEPT, ZERO, ranks_of

TOLERANCE = 1e-5
FACTORS = ("A", "B")
# Each engine on every number of ranks that it can have here.
EVERYWHERE: list[Any] = [
    *itertools.product([1, 2, 3], [*ZERO, "fsdp"]),
    (1, "local"),
    (4, "hybrid"),
]
EVERYWHERE += [
    pytest.param(4, engine, marks=[] if engine in ("zero3", "fsdp") else pytest.mark.heavy)
    for engine in (*ZERO, "fsdp")
]


def full_gradient(state: State, name: str, step: int) -> np.ndarray:
    """G = ∂ℓ/∂W of the toy's loss at this state, from the data."""
    x, y = (of_layer[name].double().numpy() for of_layer in toy.data(step))
    weight = state.W + toy.SCALING * state.A @ state.B.T
    return (x @ weight.T - y).T @ x / toy.EXAMPLES


def check_transform(record: dict[str, Any], name: str, index: int, step: int) -> None:
    """One layer's transform at one fp32 step, and the optimizer's step after it."""
    before: State = record["before"][name]
    G = full_gradient(before, name, step)
    grad_A, grad_B = factor_gradients(G, before.A, before.B, toy.SCALING)
    assert relative_error(before.grad_A, grad_A) < TOLERANCE
    assert relative_error(before.grad_B, grad_B) < TOLERANCE

    alpha, beta, rule = scales(G, before.A, before.B, toy.SCALING, toy.ETA_LIPSCHITZ, toy.BOUNDS)
    assert record["rules"][index].name.lower() == rule
    assert relative_error(record["scales"][0][index], alpha) < TOLERANCE
    assert relative_error(record["scales"][1][index], beta) < TOLERANCE
    expected = transform(before, alpha, beta, toy.SCALING)
    assert expected.largest_error(record["after"][name]) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [3, pytest.param(8, marks=pytest.mark.heavy)])
@pytest.mark.parametrize(("world", "engine"), EVERYWHERE)
def test_fp32_transform_equals_reference(ranks: Any, world: int, engine: str, rank: int) -> None:
    answers = ranks(world).run(toy.steps, 3, engine=engine, rank=rank)
    for step, record in enumerate(answers[0]):
        assert record["applied"]
        for index, name in enumerate(toy.SHAPES):
            check_transform(record, name, index, step)
        check_optimizer_step(record, step)
        check_forward(record, 1e-5)
    for other in answers[1:]:
        for ours, theirs in zip(answers[0], other, strict=True):
            assert np.array_equal(ours["scales"], theirs["scales"])


def check_optimizer_step(record: dict[str, Any], step: int, tolerance: float = TOLERANCE) -> None:
    """The engine clipped and stepped with the transformed gradients and moments."""
    after: dict[str, State] = record["after"]
    unscale = 1 / record["loss_scale"]
    norm = unscale * np.sqrt(
        sum(np.sum(getattr(s, f"grad_{f}") ** 2) for s in after.values() for f in FACTORS)
    )
    assert norm == pytest.approx(record["report"].grad_norm * unscale, rel=1e-3)
    clip = unscale * min(1.0, 1.0 / (norm + 1e-6))
    for name, state in after.items():
        for f in FACTORS:
            expected = adamw(
                *(getattr(state, key.format(f)) for key in ("{}", "grad_{}", "m_{}", "v_{}")),
                step=step + 1,
                lr=toy.LEARNING_RATE,
                clip=clip,
            )
            assert relative_error(getattr(record["stepped"][name], f), expected) < tolerance


def check_forward(record: dict[str, Any], tolerance: float) -> None:
    """The next forward sees the merged weight and the stepped factors."""
    x, _ = toy.data(0)
    for name, state in record["stepped"].items():
        weight = state.W + toy.SCALING * state.A @ state.B.T
        expected = x[name].double().numpy() @ weight.T
        assert relative_error(record["output"][name], expected) < tolerance


CASES_16_BIT = [
    (f"zero{stage}", dtype, offload)
    for stage, dtype, offload in itertools.product([0, 1, 2, 3], ["bf16", "fp16"], [False, True])
    if not (stage == 0 and (offload or dtype == "fp16"))
]
CASES_16_BIT += [("fsdp", "bf16", False), ("fsdp", "bf16", True), ("local", "bf16", False)]


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.heavy), 2])
@pytest.mark.parametrize(("engine", "dtype", "offload"), CASES_16_BIT)
def test_16_bit_masters_equal_reference(
    ranks: Any, engine: str, dtype: str, offload: bool, accumulation: int
) -> None:
    case = {"engine": engine, "dtype": dtype, "offload": offload, "accumulation": accumulation}
    records = ranks(ranks_of(engine)).run(toy.steps, 3, **case)[0]
    # What the forward reads is 16-bit; so are gradients at stages 0 and 1, which a scaling rounds.
    rounding = 2.0 ** {"bf16": -8, "fp16": -10}[dtype]
    scaled = rounding if engine in ("zero0", "zero1") else 1e-6
    for step, record in enumerate(records):
        assert record["applied"]
        for index, name in enumerate(toy.SHAPES):
            alpha, beta = (scale[index] for scale in record["scales"])
            expected = transform(record["before"][name], alpha, beta, toy.SCALING)
            after = record["after"][name]
            assert expected.largest_error(after, KEPT) < 1e-6
            assert expected.largest_error(after, ("grad_A", "grad_B")) < scaled
        check_optimizer_step(record, step)
        check_forward(record, 4 * rounding)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "fsdp"])
def test_fp32_offload_equals_reference(ranks: Any, engine: str, accumulation: int) -> None:
    case = {"engine": engine, "offload": True, "accumulation": accumulation}
    check_three_steps(ranks(2).run(toy.steps, 3, **case)[0])


@pytest.mark.parametrize(("world", "engine"), [(1, "local"), (3, "fsdp"), (4, "hybrid")])
def test_fp32_accumulation_equals_reference(ranks: Any, world: int, engine: str) -> None:
    accumulation = toy.EXAMPLES // world // 2 if engine != "hybrid" else 3
    check_three_steps(ranks(world).run(toy.steps, 3, engine=engine, accumulation=accumulation)[0])


def check_three_steps(records: list[dict[str, Any]]) -> None:
    """fp32 steps against the reference, from the gradients to the next forward."""
    assert len(records) == 3
    for step, record in enumerate(records):
        assert record["applied"]
        for index, name in enumerate(toy.SHAPES):
            check_transform(record, name, index, step)
        check_optimizer_step(record, step)
        check_forward(record, 1e-5)


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
@pytest.mark.parametrize("rule", ["scalar", "nnls"])
def test_other_rules_preserve_the_function(ranks: Any, rule: str, engine: str) -> None:
    for record in ranks(2).run(toy.steps, 3, engine=engine, rule=rule)[0]:
        for index, name in enumerate(toy.SHAPES):
            alpha, beta = (scale[index] for scale in record["scales"])
            expected = transform(record["before"][name], alpha, beta, toy.SCALING)
            assert expected.largest_error(record["after"][name]) < TOLERANCE
            assert record["rules"][index].name.lower() in (rule, "column")


ADAMW = [
    *[(engine, "fp32", False) for engine in ENGINES],
    *itertools.product(["zero2", "zero3", "fsdp"], ["bf16"], [True]),
    ("zero1", "fp16", False),
    ("zero3", "fp16", False),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "dtype", "offload"), ADAMW)
def test_rule_adamw_equals_reference(ranks: Any, engine: str, dtype: str, offload: bool) -> None:
    """Scales solved for AdamW's next step, with gradients clipped as the engine clips them."""
    case = {"engine": engine, "dtype": dtype, "offload": offload, "rule": "adamw"}
    tolerance = 1e-4 if dtype == "fp32" else 1e-3
    for step, record in enumerate(ranks(ranks_of(engine)).run(toy.steps, 5, **case)[0]):
        unscale = 1 / record["loss_scale"]
        clip = unscale * min(1.0, 1.0 / (unscale * record["report"].grad_norm_before + 1e-6))
        for index, name in enumerate(toy.SHAPES):
            before: State = record["before"][name]
            alpha, beta = adamw_scales(
                before, toy.SCALING, toy.ETA_LIPSCHITZ, toy.BOUNDS, step=step + 1, clip=clip
            )
            assert relative_error(record["scales"][0][index], alpha) < tolerance
            assert relative_error(record["scales"][1][index], beta) < tolerance
            expected = transform(before, alpha, beta, toy.SCALING)
            assert expected.largest_error(record["after"][name], KEPT) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rescale_leaves_the_function_as_it_was(ranks: Any, engine: str, dtype: str) -> None:
    case = {"engine": engine, "rank": 8, "dtype": dtype}
    for record in ranks(ranks_of(engine)).run(toy.steps, 3, **case)[0]:
        for name in toy.SHAPES:
            x = toy.data(0)[0][name].double().numpy()
            outputs = [
                x @ (state.W + toy.SCALING * state.A @ state.B.T).T
                for state in (record["before"][name], record["after"][name])
            ]
            assert relative_error(outputs[1], outputs[0]) < TOLERANCE


# Where an engine has a second copy of W that the next forward could read.
SECOND_COPIES = [
    (2, {"engine": "zero3", "persist": True}),
    # What is gathered for the evaluation is kept, whole or cut up over fewer ranks.
    (2, {"engine": "fsdp", "reshard": False, "evaluate": True}),
    (2, {"engine": "fsdp", "reshard": False, "evaluate": True, "offload": True}),
    (2, {"engine": "fsdp", "reshard": False, "evaluate": True, "dtype": "bf16"}),
    (4, {"engine": "fsdp", "reshard": 2, "evaluate": True}),
    (4, {"engine": "hybrid", "reshard": False, "evaluate": True}),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("world", "case"), SECOND_COPIES)
def test_nothing_trains_on_stale_base_weights(ranks: Any, world: int, case: dict[str, Any]) -> None:
    """Every forward, of evaluation or training, reads the weight that was merged last."""
    tolerance = 4 * 2.0**-8 if case.get("dtype") == "bf16" else 1e-5
    for step, record in enumerate(ranks(world).run(toy.steps, 3, **case)[0]):
        check_forward(record, tolerance)
        for name in toy.SHAPES:  # the gradients are those of the weight as it is now
            before: State = record["before"][name]
            G = full_gradient(before, name, step)
            expected = factor_gradients(G, before.A, before.B, toy.SCALING)
            assert relative_error(before.grad_B, expected[1]) < 4 * tolerance
            assert relative_error(before.grad_A, expected[0]) < 4 * tolerance


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_weights_are_listed_after_an_evaluation(ranks: Any, engine: str) -> None:
    """What an export or a checkpoint reads, whatever is gathered at that moment."""
    for seen in ranks(ranks_of(engine)).run(toy.frozen_after_evaluation, engine=engine):
        listed = list(seen["frozen"].values())
        assert len(listed) == len(toy.SHAPES)
        assert all(map(np.array_equal, listed, seen["W"].values()))


SKIPS = [
    *itertools.product(["zero0"], ["fp32", "bf16"], [False]),
    *itertools.product(["zero1", "zero2", "zero3"], ["fp32", "bf16", "fp16"], [False, True]),
    *itertools.product(["fsdp"], ["fp32", "bf16"], [False, True]),
    *itertools.product(["hybrid", "local"], ["fp32", "bf16"], [False]),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "dtype", "offload"), SKIPS)
def test_a_skipped_step_changes_nothing(ranks: Any, engine: str, dtype: str, offload: bool) -> None:
    """One rank's loss is not finite: no rank changes anything, and the next step is taken."""
    case = {"engine": engine, "dtype": dtype, "offload": offload}
    for seen in ranks(ranks_of(engine)).run(toy.skipped_step, **case):
        assert [seen[f"step{i}_applied"] for i in range(3)] == [True, False, True]
        for name in toy.SHAPES:
            before, after = seen["step1_state"][name], seen["step1_after"][name]
            assert all(np.array_equal(getattr(before, f), getattr(after, f)) for f in KEPT)
            assert np.array_equal(seen["step0_output"][name], seen["step1_output"][name])
            assert np.isfinite(seen["step2_output"][name]).all()
            assert not np.array_equal(seen["step2_output"][name], seen["step1_output"][name])


@pytest.mark.parametrize("skip_first", [pytest.param(False, marks=pytest.mark.heavy), True])
@pytest.mark.parametrize(("engine", "dtype", "offload"), SKIPS)
def test_a_layer_that_is_not_reached_has_no_gradient(
    ranks: Any, engine: str, dtype: str, offload: bool, skip_first: bool
) -> None:
    case = {"engine": engine, "dtype": dtype, "offload": offload}
    check_unreached(
        ranks(ranks_of(engine)).run(toy.unreached_layer, skip_first=skip_first, **case)[0],
        "first",
        "second",
        skip_first,
    )


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("reshard", [False, True])
def test_a_block_that_is_not_reached_has_no_gradient(
    ranks: Any, reshard: bool, skip_first: bool
) -> None:
    """The same where a whole group of FSDP's is not reached."""
    case = {"engine": "fsdp", "reshard": reshard, "reached": "second"}
    seen = ranks(2).run(toy.unreached_layer, skip_first=skip_first, **case)[0]
    check_unreached(seen, "second", "first", skip_first)


def check_unreached(
    seen: list[dict[str, Any]], reached: str, unreached: str, skip_first: bool
) -> None:
    assert [record["applied"] for record in seen] == [True, not skip_first, True, True]
    for record in seen[2:]:
        left_out: State = record["before"][unreached]
        assert not left_out.grad_A.any()
        assert not left_out.grad_B.any()
        assert record["before"][reached].grad_B.any()


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_a_scaled_gradient_that_fp16_cannot_hold_is_skipped(ranks: Any, engine: str) -> None:
    """The loss scale falls until the scaled gradients fit; then training goes on."""
    case = {"engine": engine, "dtype": "fp16", "initial_scale_power": 20}
    seen = ranks(2).run(toy.steps, 16, **case)[0]
    applied = [record["applied"] for record in seen]
    assert not applied[0]
    assert applied[-1]
    for record in seen:
        assert all(np.isfinite(output).all() for output in record["output"].values())
        if not record["applied"]:
            for name in toy.SHAPES:
                before, after = record["before"][name], record["stepped"][name]
                assert all(np.array_equal(getattr(before, f), getattr(after, f)) for f in KEPT)
