"""Trains with compiled blocks on ranks that already run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from scalora_dist.distributed.world import World
from tests.support import runs, tiny_runs
from tests.support.workers import offloading


def train(world: World, options: dict[str, Any]) -> tuple[int, int, int]:
    """Train.

    Returns:
        the numbers of compiled graphs, of breaks between them, and of functions that were left
        eager at the limit of graphs.
    """
    with _fresh_compiler():
        runs.run(world, options)
    graphs = counters["stats"]["unique_graphs"]
    return graphs, sum(counters["graph_break"].values()), len(counters["recompile_limit"])


def train_offloading(world: World, options: dict[str, Any]) -> tuple[int, int, int]:
    """Train. Returns the number of compiled graphs, and what ``offloading.train`` returns."""
    with _fresh_compiler():
        found = offloading.train(world, options)
    return counters["stats"]["unique_graphs"], *found


@contextmanager
def _fresh_compiler() -> Iterator[None]:
    """Nothing is compiled before and after ``with``. ``counters`` are those of what is inside."""
    torch._dynamo.reset()
    counters.clear()
    # Ranks that compile in threads of their own would stop each other on two cores.
    torch._inductor.config.compile_threads = 1
    yield
    torch._dynamo.reset()
    gc.collect()  # what the compiler has left would count in other tests of this process


def refused_without_compiler(world: World, options: dict[str, Any]) -> Any:
    """The refusal of a run whose ranks find no C++ compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        return tiny_runs.refusal(world, options)
