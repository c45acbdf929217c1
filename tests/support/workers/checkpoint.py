"""Functions that ranks run in tests/checkpoint/test_storage.py."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from scalora_dist.checkpoint import tensors, writer
from scalora_dist.checkpoint.parts import FlatPart
from scalora_dist.checkpoint.run_state import find_checkpoint
from scalora_dist.checkpoint.storage import Checkpoints
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError

NUMEL = 1001


def checkpoints(world: World, folder: Path, keep: int = 3) -> Checkpoints:
    return Checkpoints(folder, world, keep=keep, timeout=timedelta(seconds=60))


def whole(step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(NUMEL) % 251 + step).to(dtype)


def cut(world: World, tensor: torch.Tensor) -> FlatPart:
    """This rank's slice of a tensor. The last ranks' slices are shorter, or empty."""
    share = -(-tensor.numel() // world.size)
    first = min(world.rank * share, tensor.numel())
    return FlatPart(tensor[first : first + share].clone(), first, tensor.numel())


def parts(world: World, step: int) -> dict[str, FlatPart]:
    """Parts of two dtypes, and of a tensor with fewer elements than ranks."""
    return {
        "wide": cut(world, whole(step)),
        "half": cut(world, whole(step, torch.bfloat16)),
        "short": cut(world, torch.tensor([float(step)])),
    }


def own(world: World) -> dict[str, FlatPart]:
    return {f"mine.{world.rank}": FlatPart(torch.full((3,), world.rank), 0, 3)}


def save(world: World, folder: Path, steps: list[int], keep: int = 3) -> list[str | None]:
    """Save at each of ``steps`` and wait. Returns each save's outcome: None, or the failure."""
    made = checkpoints(world, folder, keep)
    outcomes = []
    for step in steps:
        shared, mine = parts(world, step), own(world)
        made.save(step, shared, mine, {"step": step, "rank": world.rank})
        for part in (*shared.values(), *mine.values()):
            part.local.zero_()  # training changes the tensors at once
        outcomes.append(made.outcome(wait=True))
        world.sum(0.0)
    return outcomes


def load(world: World, folder: Path, step: int) -> bool:
    """Load a checkpoint; whether all values come back. Any number of ranks may have saved it."""
    made = checkpoints(world, folder)
    assert made.faults(folder / f"checkpoint-{step}") == []
    empty = {
        name: FlatPart(torch.zeros_like(part.local), part.offset, part.numel)
        for name, part in parts(world, 0).items()
    }
    made.load(folder / f"checkpoint-{step}", empty)
    expected = parts(world, step)
    return all(torch.equal(part.local, expected[name].local) for name, part in empty.items())


def save_with_a_failure(
    world: World, folder: Path, broken: str, rank: int, error: Exception | None = None
) -> list[str | None]:
    """Save three times. The second time, ``broken`` of the writer fails on a rank. The outcomes."""
    error = error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    made = checkpoints(world, folder)
    outcomes = []
    for step in (2, 4, 6):
        with pytest.MonkeyPatch.context() as patch:
            if step == 4 and world.rank == rank:
                patch.setattr(writer, broken, lambda *_, **__: _raise(error))
            made.save(step, parts(world, step), own(world), {})
            outcomes.append(made.outcome(wait=True))
    made.close()
    return outcomes


def _raise(error: Exception) -> None:
    raise error


def save_other_tensors(world: World, folder: Path) -> str | None:
    made = checkpoints(world, folder)
    made.save(2, parts(world, 2) | (own(world) if world.rank else {}), {}, {})
    return made.outcome(wait=True)


def save_after_lost_cuts(world: World, folder: Path, first: bool) -> bool:
    """Save what is cut otherwise than before, again after a failure. Whether it comes back right.

    Args:
        first: whether nothing was saved before the failure.
    """
    made = checkpoints(world, folder)
    if not first:
        made.save(2, {"x": FlatPart(torch.ones(4), 4 * world.rank, 8)}, {}, {})
        assert made.outcome(wait=True) is None
    swapped = {"x": FlatPart(torch.full((4,), float(world.rank)), 4 - 4 * world.rank, 8)}
    with pytest.MonkeyPatch.context() as patch:
        if world.is_main:
            patch.setattr(json, "loads", lambda _: _raise(MemoryError()))
        made.save(4, swapped, {}, {})
        assert made.outcome(wait=True) == (
            "checkpoint-4 could not be written (rank 0: MemoryError: )"
        )
    made.save(6, swapped, {}, {})
    assert made.outcome(wait=True) is None
    found = tensors.CheckpointTensors(folder / "checkpoint-6").read("x", torch.Size([8]))
    return found.tolist() == [1.0] * 4 + [0.0] * 4


def save_a_strange_dtype(world: World, folder: Path) -> str | None:
    made = checkpoints(world, folder)
    dtype = torch.complex64 if world.rank == 1 else torch.float32
    mine = {f"mine.{world.rank}": FlatPart(torch.zeros(2, dtype=dtype), 0, 2)}
    made.save(2, parts(world, 2), mine, {})
    return made.outcome(wait=True)


def opened(world: World, folder: Path, step: int) -> list[int]:
    """The ranks whose files this rank opens to load a checkpoint's "wide" and "half"."""
    made, found = checkpoints(world, folder), set()
    real = safetensors.safe_open

    def noted(path: Path, framework: str) -> Any:
        found.add(int(path.stem.removeprefix("rank-")))
        return real(path, framework=framework)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "safe_open", noted)
        wanted = {name: part for name, part in parts(world, 0).items() if name != "short"}
        made.load(folder / f"checkpoint-{step}", wanted)
    return sorted(found)


def find(world: World, folder: Path, wanted: str) -> tuple[str, list[str]]:
    """Find a checkpoint. Returns (its name, "" for none, or the refusal; warnings)."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear, logger = Ear(logging.WARNING), logging.getLogger("scalora_dist")
    logger.addHandler(ear)
    try:
        found = find_checkpoint(checkpoints(world, folder), wanted)
    except UserError as error:
        return str(error), heard
    finally:
        logger.removeHandler(ear)
    return found.name if found else "", heard


@functools.cache
def hybrid_mesh(size: int) -> DeviceMesh:
    """Made once, since its groups' threads wake 100 times a second."""
    return init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("a", "b"))


def shares(world: World, rows: int, cols: int, layout: str) -> list[list[tuple[int, list[float]]]]:
    """Every rank's share of a sharded matrix to write: (offset, values, elements of the matrix).

    Args:
        layout: "whole" (not sharded), "mesh" (hybrid, two replicas), else sharded over all ranks.
    """
    tensor = torch.arange(rows * cols, dtype=torch.float64)
    group: Any = None
    if layout == "whole":
        first, end = 0, tensor.numel()
    else:
        group = dist.group.WORLD
        if layout == "mesh":
            group = hybrid_mesh(world.size).get_group(1)
        share = -(-rows // dist.get_world_size(group)) * cols
        first = min(dist.get_rank(group) * share, tensor.numel())
        end = min(first + share, tensor.numel())
    shard = FlatShard(tensor[first:end], first, (rows, cols), group)
    part = FlatPart.share_of(shard, world)
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, (part.offset, part.local.tolist(), part.numel))
    return everyone
