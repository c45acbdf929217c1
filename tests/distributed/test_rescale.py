"""The rescale on real ranks against the dense float64 reference."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import toy
from reference import State, adamw, factor_gradients, relative_error, scales, transform

TOLERANCE = 1e-5
FACTORS = ("A", "B")


def full_gradient(state: State, name: str, step: int) -> np.ndarray:
    """G = ∂ℓ/∂W of the toy's loss at this state, from the data."""
    x, y = toy.data(step)
    x, y = x[name].double().numpy(), y[name].double().numpy()
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
    assert record["report"].rules[index].name.lower() == rule
    assert relative_error(record["scales"][0][index], alpha) < TOLERANCE
    assert relative_error(record["scales"][1][index], beta) < TOLERANCE
    expected = transform(before, alpha, beta, toy.SCALING)
    assert expected.largest_error(record["after"][name]) < TOLERANCE


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize(("world", "stage"), list(itertools.product([1, 2, 3, 4], [0, 1, 2, 3])))
def test_fp32_transform_equals_reference(ranks: Any, world: int, stage: int, rank: int) -> None:
    answers = ranks(world).run(toy.steps, 3, stage=stage, rank=rank)
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
    (stage, dtype, offload)
    for stage, dtype, offload in itertools.product([0, 1, 2, 3], ["bf16", "fp16"], [False, True])
    if not (stage == 0 and (offload or dtype == "fp16"))
]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("stage", "dtype", "offload"), CASES_16_BIT)
def test_16_bit_masters_equal_reference(
    ranks: Any, stage: int, dtype: str, offload: bool, accumulation: int
) -> None:
    case = {"stage": stage, "rank": 3, "dtype": dtype, "offload": offload}
    records = ranks(2).run(toy.steps, 3, **case, accumulation=accumulation)[0]
    # What the forward reads is 16-bit; so are the gradients, which a scaling rounds once more.
    rounding = 2.0 ** {"bf16": -8, "fp16": -10}[dtype]
    for step, record in enumerate(records):
        assert record["applied"]
        for index, name in enumerate(toy.SHAPES):
            alpha, beta = (scale[index] for scale in record["scales"])
            expected = transform(record["before"][name], alpha, beta, toy.SCALING)
            after = record["after"][name]
            masters = ("W", "A", "B", "m_A", "v_A", "m_B", "v_B")
            assert expected.largest_error(after, masters) < 1e-6
            assert expected.largest_error(after, ("grad_A", "grad_B")) < rounding
        check_optimizer_step(record, step)
        check_forward(record, 4 * rounding)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fp32_offload_equals_reference(ranks: Any, stage: int, accumulation: int) -> None:
    case = {"stage": stage, "rank": 3, "offload": True, "accumulation": accumulation}
    for step, record in enumerate(ranks(2).run(toy.steps, 3, **case)[0]):
        for index, name in enumerate(toy.SHAPES):
            check_transform(record, name, index, step)
        check_optimizer_step(record, step)
        check_forward(record, 1e-5)


@pytest.mark.parametrize("rule", ["scalar", "nnls"])
def test_other_rules_preserve_the_function(ranks: Any, rule: str) -> None:
    for record in ranks(2).run(toy.steps, 3, stage=3, rank=3, rule=rule)[0]:
        for index, name in enumerate(toy.SHAPES):
            alpha, beta = (scale[index] for scale in record["scales"])
            expected = transform(record["before"][name], alpha, beta, toy.SCALING)
            assert expected.largest_error(record["after"][name]) < TOLERANCE
            assert record["report"].rules[index].name.lower() in (rule, "column")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rescale_leaves_the_function_as_it_was(ranks: Any, stage: int, dtype: str) -> None:
    for record in ranks(2).run(toy.steps, 3, stage=stage, rank=8, dtype=dtype)[0]:
        for name in toy.SHAPES:
            x = toy.data(0)[0][name].double().numpy()
            outputs = [
                x @ (state.W + toy.SCALING * state.A @ state.B.T).T
                for state in (record["before"][name], record["after"][name])
            ]
            assert relative_error(outputs[1], outputs[0]) < TOLERANCE


def test_persisted_parameters_see_the_merge(ranks: Any) -> None:
    for record in ranks(2).run(toy.steps, 3, stage=3, rank=3, persist=True)[0]:
        check_forward(record, 1e-5)


SKIPS = [(0, "fp32", False), (0, "bf16", False)] + [
    (stage, dtype, offload)
    for stage, dtype, offload in itertools.product(
        [1, 2, 3], ["fp32", "bf16", "fp16"], [False, True]
    )
]


@pytest.mark.parametrize(("stage", "dtype", "offload"), SKIPS)
def test_a_skipped_step_changes_nothing(ranks: Any, stage: int, dtype: str, offload: bool) -> None:
    answers = ranks(2).run(toy.skipped_step, stage=stage, rank=3, dtype=dtype, offload=offload)
    kept = ("W", "A", "B", "m_A", "v_A", "m_B", "v_B")
    for seen in answers:
        assert [seen[f"step{i}_applied"] for i in range(3)] == [True, False, True]
        for name in toy.SHAPES:
            before, after = seen["step1_state"][name], seen["step1_after"][name]
            assert all(np.array_equal(getattr(before, f), getattr(after, f)) for f in kept)
            assert np.array_equal(seen["step0_output"][name], seen["step1_output"][name])
            assert np.isfinite(seen["step2_output"][name]).all()
            assert not np.array_equal(seen["step2_output"][name], seen["step1_output"][name])


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize(("stage", "dtype", "offload"), SKIPS)
def test_a_layer_that_is_not_reached_has_no_gradient(
    ranks: Any, stage: int, dtype: str, offload: bool, skip_first: bool
) -> None:
    case = {"stage": stage, "rank": 3, "dtype": dtype, "offload": offload}
    seen = ranks(2).run(toy.unreached_layer, skip_first=skip_first, **case)[0]
    assert [record["applied"] for record in seen] == [True, not skip_first, True, True]
    for record in seen[2:]:
        second: State = record["before"]["second"]
        assert not second.grad_A.any()
        assert not second.grad_B.any()
        assert record["before"]["first"].grad_B.any()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_scaled_gradient_that_fp16_cannot_hold_is_skipped(ranks: Any, stage: int) -> None:
    """The loss scale falls until the scaled gradients fit; then training goes on."""
    case = {"stage": stage, "rank": 3, "dtype": "fp16", "initial_scale_power": 20}
    seen = ranks(2).run(toy.steps, 16, **case)[0]
    applied = [record["applied"] for record in seen]
    assert not applied[0]
    assert applied[-1]
    for record in seen:
        assert all(np.isfinite(output).all() for output in record["output"].values())
        if not record["applied"]:
            for name in toy.SHAPES:
                unchanged = ("W", "A", "B", "m_A", "v_A", "m_B", "v_B")
                before, after = record["before"][name], record["stepped"][name]
                assert all(np.array_equal(getattr(before, f), getattr(after, f)) for f in unchanged)
