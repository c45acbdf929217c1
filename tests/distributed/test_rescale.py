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
            assert all(np.array_equal(a, b) for a, b in zip(ours["scales"], theirs["scales"]))


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
