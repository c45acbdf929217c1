"""Writes a plan for the user: what the run needs, whether it fits, what to change."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch

from scalora_dist.config.options import Options
from scalora_dist.errors import UserError
from scalora_dist.planning.arguments import PlanArguments, config_folder
from scalora_dist.planning.least_times import least_times_of
from scalora_dist.planning.plan import GIB
from scalora_dist.planning.planner import Planner
from scalora_dist.planning.table import as_json, describe, render, verdict
from scalora_dist.profiling.gpus import GPUS, find_gpu
from scalora_dist.training.run_log import write_json

logger = logging.getLogger(__name__)


def report(options: Options, where: PlanArguments) -> str:
    """Plan a run and return the text of the plan. Also writes the file ``where.json``, if given.

    Args:
        options: options of the run.
        where: the model and the cluster.

    Raises:
        UserError: no model is given, or the trainer would refuse these options.
    """
    model = where.model or options.model.model_name_or_path
    if not model:
        raise UserError("--model is missing: name one of the hub, a folder or a config.json")
    where = replace(where, model=model)
    options = options.having(model_name_or_path=config_folder(model, options.model.model_revision))
    planner = Planner(options, where)
    plan = planner.plan(options, where.gpus)
    times, fits = least_times_of(plan, where), planner.fits(plan)
    lines = [
        describe(plan.options, where),
        "",
        render(plan, times, where),
        "",
        verdict(plan, fits, where),
    ]
    if not fits:
        if change := planner.what_to_change():
            words, changed = change
            lines.append(f"with {words}: {changed.peak.total / GIB:.1f} GiB")
        else:
            lines.append(
                "no change known here makes it fit on these GPUs: take more, or larger ones"
            )
    if smallest := planner.smallest():
        gpus, words, small = smallest
        given = f" with {words}" if words else ""
        size = f"{small.peak.total / GIB:.1f} GiB"
        if host := sum(small.held.host.values()):
            size += f", and {host / GIB:.1f} GiB of host memory for each"
        lines.append(f"smallest set-up that fits: {gpus} × {where.gpu}{given}, {size}")
    if where.json:
        write_json(Path(where.json), as_json(plan, times, fits))
    return "\n".join(lines)


def where_we_are() -> PlanArguments:
    """The ranks from the launcher's environment variables, on GPUs of this machine's kind.

    If this machine has no GPU, or an unknown one, the GPU is that of a plan by default.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", str(ranks))))
    where = PlanArguments(nodes=ranks // here, gpus_per_node=here)
    gpu = find_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if gpu is None:
        logger.warning(
            "no GPU that is known here: planned for %s; scalora plan --gpu names another", where.gpu
        )
    return replace(where, gpu=next((key for key, x in GPUS.items() if x == gpu), where.gpu))
