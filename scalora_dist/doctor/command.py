"""``scalora doctor``: checks the machine, the network between the ranks, and the engines."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from scalora_dist.config.option import Group, tool_option
from scalora_dist.config.parser import Parser
from scalora_dist.distributed.world import World
from scalora_dist.doctor.disk import check_disk
from scalora_dist.doctor.engines import check_engines
from scalora_dist.doctor.finding import Finding, table
from scalora_dist.doctor.machine import check_machines
from scalora_dist.doctor.network import check_collectives
from scalora_dist.errors import UserError

DESCRIPTION = """Check the machine, the network between the ranks, and the engines, in a minute.
Start it on the ranks that will train, by the launcher that will start them, e.g.
`torchrun --nproc_per_node 8 -m scalora_dist doctor --output_dir /shared/runs`."""


@dataclass(frozen=True)
class DoctorArguments(Group):
    _argument_group_name = "doctor"

    output_dir: str = tool_option(".", "The folder that runs will write to; all nodes share it.")
    engines: bool = tool_option(True, "Also train a tiny model under ZeRO-3 and FSDP2.")
    timeout: int = tool_option(120, "Seconds after which a collective gives up.", at_least=1)
    local_rank: int = tool_option(-1, "Set by the launcher.")


def doctor_command(words: Sequence[str]) -> None:
    """Run all checks and print their table on rank 0. Exits with status 1 if one failed.

    Raises:
        UserError: a mistake in the options, or the ranks do not meet.
    """
    parser = Parser(
        [DoctorArguments], allow_abbrev=False, prog="scalora doctor", description=DESCRIPTION
    )
    (args,) = parser.parse_args_into_dataclasses(list(words))
    logging.getLogger("scalora_dist").setLevel(logging.ERROR)
    begun = time.monotonic()
    world = join(args)
    findings = [*check_machines(world), *check_collectives(world)]
    shared = check_disk(world, Path(args.output_dir))
    findings.append(shared)
    if args.engines and shared.failed:
        findings.append(Finding("engines", "not tried: they need the shared folder"))
    elif args.engines:
        findings += check_engines(world, Path(args.output_dir))
    failed = world.max(any(each.failed for each in findings))[0] > 0
    if world.is_main:
        print(f"\n{table(findings)}\n{time.monotonic() - begun:.0f} s", flush=True)
    world.leave()
    if failed:
        sys.exit(1)


def join(args: DoctorArguments) -> World:
    """Meet the other ranks.

    Raises:
        UserError: they do not meet in time.
    """
    try:
        return World.join(local_rank=args.local_rank, timeout=timedelta(seconds=args.timeout))
    except (dist.DistError, RuntimeError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the {os.environ.get('WORLD_SIZE')} ranks did not meet at {where} in "
            f"{args.timeout} s: start all nodes, and see that a firewall lets this port and those "
            f"above 1024 through ({str(error).partition(chr(10))[0]})"
        ) from error
