"""A plan as people read it: what is needed, whether it fits, what to change."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path

import torch

from scalora_dist.config.options import Options
from scalora_dist.errors import UserError
from scalora_dist.planning.arguments import PlanArguments, config_folder
from scalora_dist.planning.floors import floors_of
from scalora_dist.planning.plan import GIB
from scalora_dist.planning.planner import Planner
from scalora_dist.planning.table import as_json, describe, render, verdict
from scalora_dist.profiling.gpus import GPUS, find_gpu
from scalora_dist.training.run_log import write_json

logger = logging.getLogger(__name__)


def report(options: Options, where: PlanArguments) -> str:
    """Plan the run of ``options``; also writes ``where.json``.

    Raises:
        UserError: as the trainer would for these options.
    """
    options = copy.deepcopy(options)
    where.model = where.model or options.model.model_name_or_path
    if not where.model:
        raise UserError("--model is missing: name one of the hub, a folder or a config.json")
    options.model.model_name_or_path = config_folder(where.model)
    planner = Planner(options, where)
    plan = planner.plan(options, where.gpus)
    options.train.settle_batch(where.gpus)
    floors, fits = floors_of(plan, where), planner.fits(plan)
    lines = [
        describe(options, where),
        "",
        render(plan, floors, options, where),
        "",
        verdict(plan, fits, where),
    ]
    if not fits:
        if change := planner.what_to_change():
            words, changed = change
            lines.append(f"with {words}: {changed.peak.total / GIB:.1f} GiB")
        else:
            lines.append("nothing known here makes it fit on these GPUs: take more, or larger ones")
    if smallest := planner.smallest():
        gpus, words, small = smallest
        given = f" with {words}" if words else ""
        size = f"{small.peak.total / GIB:.1f} GiB"
        if host := sum(small.held.host.values()):
            size += f", and {host / GIB:.1f} of the host for each"
        lines.append(f"smallest set-up that fits: {gpus} × {where.gpu}{given}, {size}")
    if where.json:
        write_json(Path(where.json), as_json(plan, floors, fits))
    return "\n".join(lines)


def where_we_are() -> PlanArguments:
    """The ranks that a launcher's environment describes, on GPUs of this machine's kind.

    Where it has none, or one that is not known, on those that a plan is for by default.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", str(ranks))))
    where = PlanArguments(nodes=ranks // here, gpus_per_node=here)
    gpu = find_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if gpu is None:
        logger.warning("this machine's GPU is not known: planned for %s", where.gpu)
    where.gpu = next((key for key, known in GPUS.items() if known == gpu), where.gpu)
    return where
