"""Functions that ranks run in tests/doctor/."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from scalora_dist.config.parser import parse_options
from scalora_dist.distributed.world import World
from scalora_dist.doctor import checkup as checkup_module
from scalora_dist.doctor import disk, machine, network
from scalora_dist.doctor.checkup import Checkup
from scalora_dist.doctor.command import examine
from scalora_dist.doctor.disk import SharedFolder
from scalora_dist.doctor.engines import TinyRuns, losses_and_norms, options, save_model
from scalora_dist.doctor.finding import Finding
from scalora_dist.training.trainer import Trainer


def table(world: World, checks: Callable[[Checkup], object]) -> tuple[int, str]:
    """Run checks. Returns the number that failed and what this rank printed."""
    checkup, printed = Checkup(world, 60), io.StringIO()
    try:
        with redirect_stdout(printed):
            checks(checkup)
    finally:
        checkup.close()
    return checkup.failed, printed.getvalue()


def raising(world: World, wrong: set[int]) -> tuple[int, str]:
    """Three checks. The second one raises on the ranks ``wrong``."""

    def second() -> Finding:
        if world.rank in wrong:
            raise ValueError(f"seen by {world.rank}\nand more")
        return Finding("fine")

    def checks(checkup: Checkup) -> None:
        checkup.run("first", lambda: Finding("fine"))
        checkup.run("second", second)
        checkup.run("third", lambda: Finding(f"sum {world.sum(1.0)[0]:.0f}"))

    return table(world, checks)


def left_alone(world: World, log: Path, how: str) -> None:
    """Rank 1 hangs or raises in a check while rank 0 is in a collective. Ends the processes."""
    checkup_module.GRACE = 0.5
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    checkup = Checkup(world, 8 if how == "hangs" else 30)

    def check() -> Finding:
        if world.rank == 0:
            world.sum(0.0)
        elif how == "hangs":
            time.sleep(100)
        raise ValueError("no such device")

    checkup.run("links", lambda: Finding("fine"))
    checkup.run("all-reduce", check)


def collective(world: World, name: str, wrong: dict[int, torch.dtype]) -> Finding:
    """Check a collective whose result is wrong in one entry on some ranks, in one dtype."""
    functions = {
        "all-reduce": "all_reduce",
        "all-gather": "all_gather_into_tensor",
        "reduce-scatter": "reduce_scatter_tensor",
        "broadcast": "broadcast",
    }
    real = getattr(dist, functions[name])

    def faulty(result: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        real(result, *args, **kwargs)
        if result.dtype == wrong.get(world.rank):
            result[-1] += 1

    with mock.patch.object(dist, functions[name], faulty):
        return network.check_collective(world, name)


def interconnect(world: World, ranks_of_each: int) -> Finding:
    local_rank = world.rank % ranks_of_each
    return network.check_interconnect(replace(world, local_rank=local_rank))


def clocks(world: World, offsets: list[float]) -> Finding:
    now = time.time
    with mock.patch.object(time, "time", lambda: now() + offsets[world.rank]):
        return machine.check_clocks(world)


def versions(world: World, others: list[Path]) -> Finding:
    """Compare versions. Rank r also finds what is installed in ``others[r]``."""
    sys.path.insert(0, str(others[world.rank]))
    importlib.invalidate_caches()
    try:
        return machine.check(world, machine.compare_versions)
    finally:
        sys.path.pop(0)


def shared_folder(world: World, output_dirs: list[Path], nodes: int) -> Finding:
    """Check a relative --output_dir in another working directory on each rank."""
    disk.BYTES, disk.NFS_SECONDS = disk.MIB, 0.5
    before = Path.cwd()
    os.chdir(output_dirs[world.rank])
    folder = SharedFolder(Path("runs"))
    os.chdir(before)
    try:
        lead = world.rank if nodes == 1 else 0
        return folder.check(replace(world, local_rank=lead, nodes=nodes))
    finally:
        folder.delete()


def killed_with_a_folder(parent: Path) -> None:
    """Not a rank."""
    folder = SharedFolder(parent)
    folder.parent = parent
    folder._make()
    os.kill(os.getpid(), signal.SIGKILL)


def whole(world: World, output_dir: Path) -> tuple[int, str]:
    """All checks but those of the engines."""
    disk.BYTES = disk.MIB
    folder = SharedFolder(output_dir)
    try:
        return table(world, lambda checkup: examine(checkup, folder, engines=False))
    finally:
        folder.delete()


def engine(world: World, output_dir: Path, how: str) -> tuple[int, str]:
    """Check ZeRO-3 against FSDP2's run, with an error of 1 % in the loss, or with an exception."""
    folder = SharedFolder(output_dir)
    folder.path = output_dir
    runs = TinyRuns(world, folder)
    world.main_only(lambda: save_model(output_dir))
    words = [*options(output_dir, output_dir / "first", world.size), "--fsdp"]
    Trainer(parse_options(words), world).run()
    runs.reference = losses_and_norms(output_dir / "first")
    step = Trainer.take_step

    def take_step(self: Trainer, *args: Any) -> Any:
        if how == "raises":
            raise ValueError("no kernel")
        record, votes = step(self, *args)
        if how == "wrong":
            record["loss"] *= 1.01
        return record, votes

    with mock.patch.object(Trainer, "take_step", take_step):
        return table(world, lambda checkup: checkup.run("ZeRO-3", lambda: runs.check("ZeRO-3")))
