"""ZeRO++'s second shards within a node (hpZ): no forward or backward reads them after a merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalora_dist.distributed.world import World
from scalora_dist.training.trainer import Trainer
from tests.support import runs, tiny_runs
from tests.support.ranks import Ranks

GetRanks = Callable[[int], Ranks]
HEAVY = pytest.mark.heavy

STEPS, SIZE, NODE = 4, 4, 2
TASK = {
    "max_steps": STEPS,
    "eval_steps": 2,
    "save_steps": 2,
    "scaling_interval": 1,
    "gradient_checkpointing": True,
    "per_device_train_batch_size": 1,
    "train_batch_size": 8,  # two micro-batches a step
    "learning_rate": 1e-2,
}
FOUR_BITS = {"load_in_4bit": True, "carry_rank": 8, "carry_room": 4}


def ds_config(folder: Path, name: str, **zero: Any) -> Path:
    config = json.loads(Path(runs.ds_config("zero3")).read_text())
    config["zero_optimization"] |= zero
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return path


def train(world: World, case: dict[str, Any]) -> list[set[int]]:
    """Train; after each evaluation, over how many ranks parameters' second copies are cut up."""
    seen: list[set[int]] = []

    class Watched(Trainer):
        def _evaluate(self, *args: Any, **named: Any) -> Any:
            result = super()._evaluate(*args, **named)
            seen.append(
                {
                    world.size * p.ds_tensor.ds_numel // p.ds_secondary_tensor.numel()
                    for p in self.model.parameters()
                    if p.ds_secondary_tensor is not None
                }
            )
            return result

    runs.make(world, case, Watched).run()
    return seen


@pytest.mark.parametrize(
    ("others", "zero"),
    [
        pytest.param({}, {}, id="fp32"),
        pytest.param(
            {}, {"stage3_param_persistence_threshold": 1000}, marks=HEAVY, id="some stay gathered"
        ),
        pytest.param({}, {"stage3_max_reuse_distance": 0}, marks=HEAVY, id="freed at once"),
        pytest.param({}, {"offload_param": {"device": "cpu"}}, marks=HEAVY, id="offloaded"),
        pytest.param({"bf16": True}, {}, marks=HEAVY, id="bf16"),
        pytest.param(FOUR_BITS, {}, marks=HEAVY, id="4-bit"),
    ],
)
def test_losses_are_those_without(
    ranks: GetRanks, odd: Path, tmp_path: Path, others: dict[str, Any], zero: dict[str, Any]
) -> None:
    """4 steps with a merge each, an evaluation between them, and from a checkpoint on."""
    folders, seen = {}, {}
    for name, size in (("plain", 1), ("hpz", NODE)):
        path = ds_config(tmp_path, name, zero_hpz_partition_size=size, **zero)
        folders[name] = tmp_path / name
        case = tiny_runs.options(odd, folders[name], "zero3", **TASK | others) | {"ds_config": path}
        seen[name] = ranks(SIZE).run(train, case, timeout=200)
    assert all(found == set() for rank in seen["plain"] for found in rank)
    assert all(found == {NODE} for rank in seen["hpz"] for found in rank)
    check_same(folders)

    shutil.rmtree(folders["hpz"] / f"checkpoint-{STEPS}")
    ranks(SIZE).run(train, case | {"resume_from_checkpoint": "latest"}, timeout=200)
    check_same(folders)


def check_same(folders: dict[str, Path]) -> None:
    for of in (runs.losses, tiny_runs.evaluations):
        plain, hpz = (of(folders[name]) for name in ("plain", "hpz"))
        assert len(plain) > 2 and hpz == pytest.approx(plain, rel=1e-6)
        # Enough has changed for a stale copy to show.
        assert abs(plain[-1] - plain[0]) > 0.1
