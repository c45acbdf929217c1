"""What an engine's state and layers hold: enough to go on, and the same wherever it is held."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.support import toy
from tests.support.toy import ENGINES, KEPT, ranks_of

CASES = [
    *itertools.product(ENGINES, ["fp32", "bf16"]),
    *itertools.product(["zero1", "zero2", "zero3"], ["fp16"]),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "dtype"), CASES)
def test_a_restored_run_goes_on_bit_for_bit(ranks: Any, engine: str, dtype: str) -> None:
    """``state()`` and the layers' shards are copied into a fresh engine, which takes a step."""
    for seen in ranks(ranks_of(engine)).run(toy.restored, engine=engine, dtype=dtype):
        check_same(seen)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "fsdp"])
def test_an_offloaded_run_is_restored_bit_for_bit(ranks: Any, engine: str) -> None:
    for seen in ranks(2).run(toy.restored, engine=engine, dtype="bf16", offload=True):
        check_same(seen)


def check_same(seen: dict[str, Any]) -> None:
    """Both runs agree after step 2 and after step 3, between which something happened."""
    for (states, outputs), (other_states, other_outputs) in zip(
        seen["first"], seen["second"], strict=True
    ):
        for name in toy.SHAPES:
            assert np.array_equal(outputs[name], other_outputs[name])
            for field in KEPT:
                ours, theirs = (getattr(s[name], field) for s in (states, other_states))
                assert np.array_equal(ours, theirs), f"{name}.{field}"
    (before, _), (after, _) = seen["first"]
    for name, field in itertools.product(toy.SHAPES, KEPT):
        assert not np.array_equal(getattr(before[name], field), getattr(after[name], field))


# Which ranks hold the same.
REPLICAS = {"zero0": [(0, 1)], "zero2": [(0, 1)], "hybrid": [(0, 2), (1, 3)]}


@pytest.mark.parametrize("engine", REPLICAS)
def test_ranks_that_hold_the_same_hold_the_same_bits(ranks: Any, engine: str) -> None:
    """α, β and both halves of W after each of 6 bf16 steps, and the replicas' factors too."""
    case = {"engine": engine, "dtype": "bf16", "rank": 8}
    answers = ranks(ranks_of(engine)).run(toy.bits_after_steps, 6, **case)
    for steps in zip(*answers, strict=True):
        for scale in ("alpha", "beta"):
            assert len({held[scale] for held in steps}) == 1
    # ZeRO-2 holds W whole on every rank, but cuts up A and B.
    keys = [k for k in answers[0][0] if engine != "zero2" or k.endswith((".W", ".low"))]
    assert sum(key.endswith(".low") for key in keys) == len(toy.SHAPES)
    for (ours, theirs), key in itertools.product(REPLICAS[engine], keys):
        assert all(a[key] == b[key] for a, b in zip(answers[ours], answers[theirs], strict=True))
    for key in keys:  # they did change, the low halves too
        assert len({held[key] for held in answers[0]}) == 6
