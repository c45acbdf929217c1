"""The memory that an initialization takes for gradients: what it measures, logs and computes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scalora_dist.core.host_sums import HostSums
from scalora_dist.errors import UserError
from scalora_dist.methods.init import initialization, room
from scalora_dist.methods.init.groups import Budget
from tests.support import runs, tiny_models, tiny_runs
from tests.support.ranks import Ranks
from tests.support.refusals import one_sentence
from tests.support.workers import room as work
from tools.fake_gpu.device import fake_gpu
from tools.fake_gpu.layers import known_ranges

GetRanks = Callable[[int], Ranks]
OPTIONS: dict[str, dict[str, Any]] = {
    "lora-sb": {"lora_alpha": None},
    "lora-ga": {"rank": 2},
}
GIB = 2**30


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("room"))


def case(task: Path, folder: Path, engine: str, method: str, **others: Any) -> dict[str, Any]:
    options = {"method": method, "start_samples": 5, **OPTIONS[method], **others}
    return tiny_runs.options(task, folder / "run", engine, **options)


@pytest.mark.parametrize(
    ("size", "engine", "method"),
    [
        (1, "local", "lora-sb"),
        (2, "zero3", "lora-ga"),
        pytest.param(2, "fsdp", "lora-sb", marks=pytest.mark.heavy),
        pytest.param(1, "local", "lora-ga", marks=pytest.mark.heavy),
    ],
)
def test_a_start_does_not_depend_on_memory(
    ranks: GetRanks, task: Path, tmp_path: Path, size: int, engine: str, method: str
) -> None:
    """What is free, --start_memory, and little memory of any kind give the same numbers."""

    def start(free: Budget | None = None, **others: Any) -> tuple[dict[str, Any], int]:
        options = case(task, tmp_path, engine, method, overwrite_output_dir=True, **others)
        first, *_ = ranks(size).run(work.started, options, free, unit=1000)
        passes = re.search(r"(\d+) pass\(es\)", first.logged)
        assert passes, first.logged
        return first.added, int(passes[1])

    expected, passes = start()
    assert passes == 1
    tried: list[tuple[Budget | None, dict[str, int], bool]] = [
        (None, {"start_memory": 1}, True),
        (Budget(10**6), {"start_memory": 1}, True),
        (Budget(2000, 1500), {}, True),
        (Budget(2000, 1500), {"start_memory": 1000}, True),
        (Budget(1500, 10**6), {}, False),
    ]
    for free, others, several in tried:
        added, passes = start(free, **others)
        assert (passes > 1) == several
        for layer, parameters in expected.items():
            for name, value in parameters.items():
                assert np.array_equal(added[layer][name], value), (free, others, layer, name)


def test_ranks_share_the_host_and_agree(ranks: GetRanks) -> None:
    assert ranks(2).run(work.shared_out) == [Budget(0, 1500)] * 2  # half of 6000, for two ranks
    assert ranks(1).run(work.shared_out) == [Budget(0, 4000)]


class Allocator:
    """Counts of torch's allocator on a GPU of 80 GiB, and the memory of a host.

    Attributes:
        now: bytes allocated, of the model.
        cached: bytes that the allocator keeps although no tensor has them.
        peak: the largest ``now`` since the last reset.
    """

    def __init__(self) -> None:
        self.now, self.cached, self.peak = 10 * GIB, 30 * GIB, 70 * GIB

    def use(self, size: int) -> None:
        """Allocate and free."""
        self.peak = max(self.peak, self.now + size)
        self.cached = size

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        for name, value in {
            "memory_allocated": lambda device: self.now,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.now),
            "empty_cache": lambda: setattr(self, "cached", 0),
            "mem_get_info": lambda device: (80 * GIB - self.now - self.cached, 80 * GIB),
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(room, "available_bytes", lambda: 160 * GIB)


def test_a_gpu_has_what_is_free_less_the_peak_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an earlier peak was, and whatever is cached."""
    allocator = Allocator()
    with fake_gpu(3, 16) as world:
        allocator.patch(monkeypatch)
        found = room.free_room(lambda: allocator.use(20 * GIB), world)
        assert found == Budget(int(0.9 * 70 * GIB) - 20 * GIB, 10 * GIB)  # 8 ranks share a host
        assert room.free_room(lambda: allocator.use(69 * GIB), world).device == 0
    assert allocator.cached == 0


@pytest.fixture
def load_in_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads weights in other threads, in which the GPU is not faked."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")


@pytest.mark.usefixtures("load_in_this_thread")
def test_sums_on_the_host_of_a_gpu(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is copied down, and each sum up again for its SVD."""
    added: list[torch.device] = []
    add = HostSums.add_

    def noted(self: HostSums, total: Tensor, part: Tensor) -> None:
        added.append(part.device)
        assert total.device.type == "cpu" and total.shape == part.shape
        add(self, total, part)

    monkeypatch.setattr(HostSums, "add_", noted)
    monkeypatch.setattr(initialization, "free_room", lambda rehearse, world: Budget(0, GIB))
    with fake_gpu(3, 8) as world, known_ranges("fsdp"):
        options = case(task, tmp_path, "fsdp", "lora-sb", train_batch_size=24, eval_size=None)
        trainer = runs.make(world, options)
        trainer.loss.checked = True  # by a value that the GPU does not have
        trainer.start()
        trainer.close()
        layers = len(trainer.engine.adapted)
    assert [device.type for device in added] == ["cuda"] * layers  # 5 samples, one for each rank


@pytest.mark.usefixtures("load_in_this_thread")
def test_too_little_memory_names_the_option(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(initialization, "rehearse", full)
    with fake_gpu() as world:
        options = case(task, tmp_path, "local", "lora-sb", train_batch_size=3, eval_size=None)
        trainer = runs.make(world, options)
        with pytest.raises(UserError) as error:
            trainer.start()
        trainer.close()
    assert "--start_memory" in one_sentence(error)
