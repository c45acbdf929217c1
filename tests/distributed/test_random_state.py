"""A captured generator draws again what it drew."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from scalora_dist.distributed import random_state

CPU = torch.device("cpu")


def draw() -> list[float]:
    """Of each generator: an odd number of normals, so that one is left over in two of them."""
    return [
        *torch.randn(3).tolist(),
        *torch.rand(2).tolist(),
        *(random.gauss(0, 1) for _ in range(3)),
        random.random(),
        *np.random.normal(size=3),
        np.random.random(),
    ]


@pytest.fixture(autouse=True)
def _others_generators() -> Iterator[None]:
    """Other tests go on drawing as if this one had not been."""
    states = random_state.capture(CPU)
    yield
    random_state.restore(states, CPU)


@pytest.mark.parametrize("drawn_before", [0, 1, 2, 700])
def test_drawing_goes_on(drawn_before: int) -> None:
    """Also with a normal left over, and after the Mersenne twisters have turned over."""
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(5)
    for _ in range(drawn_before):
        draw()
    states = {name: state.clone() for name, state in random_state.capture(CPU).items()}
    expected = draw()
    assert draw() != expected
    random_state.restore(states, CPU)
    assert draw() == expected


def test_states_are_tensors_of_fixed_size() -> None:
    """A checkpoint is read into what another run has captured: only then do the ranges fit."""
    before = random_state.capture(CPU)
    draw()
    after = random_state.capture(CPU)
    assert before.keys() == after.keys() == {"torch", "python", "numpy"}
    for name, state in before.items():
        assert state.ndim == 1 and state.shape == after[name].shape
        assert state.dtype == after[name].dtype in (torch.uint8, torch.int64)
        assert not torch.equal(state, after[name])
