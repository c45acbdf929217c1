"""``scalora doctor``: checks the machine, the network between the ranks, and the engines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from scalora_dist.config.option import Group, tool_option
from scalora_dist.config.words import Parser
from scalora_dist.distributed.world import World
from scalora_dist.doctor import machine
from scalora_dist.doctor.checkup import Checkup
from scalora_dist.doctor.disk import SharedFolder
from scalora_dist.doctor.engines import ENGINES, TinyRuns
from scalora_dist.doctor.network import (
    COLLECTIVES,
    check_collective,
    check_interconnect,
)
from scalora_dist.errors import UserError

DESCRIPTION = """Check the machine, the network between the ranks, and the engines, in a minute.
Start it on the ranks that will train, by the launcher that will start them, e.g.
`torchrun --nproc_per_node 8 -m scalora_dist doctor --output_dir /shared/runs`."""


@dataclass(frozen=True)
class DoctorArguments(Group):
    _argument_group_name = "doctor"

    output_dir: str = tool_option(".", "The folder that runs will write to; all nodes share it.")
    engines: bool = tool_option(True, "Also train a tiny model under ZeRO-3 and FSDP2.")
    hang_timeout: int = tool_option(
        180, "Seconds after which a rank that hangs in a check ends the doctor.", at_least=1
    )
    ddp_timeout: int = tool_option(
        300, "Seconds to wait for ranks that have not started.", at_least=1
    )
    local_rank: int = tool_option(-1, "Set by the launcher.")


def doctor_command(words: Sequence[str]) -> None:
    """Run all checks; rank 0 prints their table. Exits with status 1 if one failed.

    Raises:
        UserError: a mistake in the options, or the ranks do not meet.
    """
    parser = Parser(
        [DoctorArguments], allow_abbrev=False, prog="scalora doctor", description=DESCRIPTION
    )
    (args,) = parser.parse_args_into_dataclasses(list(words))
    begun = time.monotonic()
    world = meet(args)
    if world.is_main:
        print(f"\nscalora doctor: {world.size} rank(s) on {world.nodes} node(s)\n", flush=True)
    checkup = Checkup(world, args.hang_timeout)
    folder = SharedFolder(Path(args.output_dir))
    try:
        examine(checkup, folder, engines=args.engines)
    finally:
        folder.delete()
    if world.is_main:
        seconds = f"({time.monotonic() - begun:.0f} s after the imports)"
        failed = f"{checkup.failed} check(s) failed" if checkup.failed else "ready to train"
        print(f"\n{failed} {seconds}", flush=True)
    checkup.close()
    world.leave()
    if checkup.failed:
        sys.exit(1)


def examine(checkup: Checkup, folder: SharedFolder, *, engines: bool) -> None:
    """Run all checks, from those that need least to those that need most."""
    world = checkup.world
    for name, compare in machine.CHECKS.items():
        checkup.run(name, partial(machine.check, world, compare))
    checkup.run("clocks", lambda: machine.check_clocks(world))
    shared = checkup.run("shared folder", lambda: folder.check(world))
    connected = True
    if world.size > 1:
        for name in COLLECTIVES:
            connected &= checkup.run(name, partial(check_collective, world, name))
        if world.nodes > 1:
            checkup.run("interconnect", lambda: check_interconnect(world))
    if not engines:
        return
    unless = "" if shared else "the engines need the shared folder"
    unless = unless if connected else "the engines need right collectives"
    runs = TinyRuns(world, folder, 0.8 * checkup.watchdog.timeout)
    alone = checkup.run("one process", runs.alone, unless=unless)
    for name in ENGINES:
        why = unless or ("" if alone else "there is nothing to compare with")
        checkup.run(name, partial(runs.check, name), unless=why)


def meet(args: DoctorArguments) -> World:
    """Meet the other ranks.

    Raises:
        UserError: they do not meet in time, or cannot send each other a number.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    if torch.cuda.is_available() and here > torch.cuda.device_count():
        raise UserError(
            f"{here} ranks on a node that shows {torch.cuda.device_count()} GPU(s): start one rank "
            "for each GPU that CUDA_VISIBLE_DEVICES shows"
        )
    try:
        return World.join(local_rank=args.local_rank, timeout=timedelta(seconds=args.ddp_timeout))
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the {os.environ.get('WORLD_SIZE')} ranks did not meet at {where} in "
            f"{args.ddp_timeout} s: start all nodes, and let this port and those above 1024 "
            "through the firewall"
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"the ranks met but cannot send each other a number "
            f"({str(error).strip().partition(chr(10))[0]}): give each rank a GPU of its own, let "
            "ports above 1024 through the firewall, and set NCCL_SOCKET_IFNAME and "
            "GLOO_SOCKET_IFNAME to the interface that joins the nodes"
        ) from error
