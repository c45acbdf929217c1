"""Saves and restores the state of a run, and checks that a run may resume from a checkpoint."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import set_seed

from scalora_dist.checkpoint.manifest import (
    FORMAT,
    LIBRARIES,
    RANDOM,
    checkpoint_folder,
    is_sound,
    read_state,
    step_of,
)
from scalora_dist.checkpoint.parts import FlatPart
from scalora_dist.checkpoint.replicas import check_replicas
from scalora_dist.checkpoint.storage import Checkpoints
from scalora_dist.config.option import declarations, default_of
from scalora_dist.config.options import Options
from scalora_dist.core.checksum import bits
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.distributed import random_state
from scalora_dist.engines.base import Engine
from scalora_dist.errors import UserError
from scalora_dist.layers.fourbit_linear import FourBitLinear
from scalora_dist.methods.runner import MethodRunner
from scalora_dist.model_io.model_card import names_on_hub
from scalora_dist.profiling.versions import installed_versions

logger = logging.getLogger(__name__)

# What else decides an option's value.
ALSO = {
    "train_batch_size": ", or change --per_device_train_batch_size or "
    "--gradient_accumulation_steps",
}


class RunState:
    """The tensors and numbers that define a run between two steps.

    Construct it while the weights are as they were loaded: it takes their fingerprint.
    """

    def __init__(
        self,
        engine: Engine,
        runner: MethodRunner,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        options: Options,
        data: str,
    ) -> None:
        """
        Args:
            data: checksum of the token ids and labels (`data.identity.checksum`).
        """
        self.engine = engine
        self.world = engine.world
        self.runner = runner
        self.scheduler = scheduler
        self.options = options
        self.data = data
        self.base = fingerprint(engine)
        self.names_on_hub = names_on_hub(options)  # before a folder of such a name may go

    def save(self, checkpoints: Checkpoints, step: int, progress: dict[str, Any]) -> None:
        """Begin to write a checkpoint. Called on every rank.

        Args:
            step: number of steps so far, skipped ones included.
            progress: what the run remembers of its past, JSON values; only rank 0's are kept.

        Raises:
            ReplicasDiffer: on every rank, if copies of one tensor differ. Nothing is written.
        """
        # The replicas of a hybrid mesh may round the sums in a sketch differently.
        check_replicas(self._model_shards(), self.engine, step, checkpoints.newest_first)
        state = {
            "format": FORMAT,
            "step": step,
            "progress": progress,
            "world_size": self.world.size,
            "device": self.world.device.type,
            "engine": self.engine.state(),
            "schedule": {"last_epoch": self.scheduler.last_epoch},
            "merges": self.runner.merger.target.state() if self.runner.merger else {},
            "base": self.base,
            "data": self.data,
            "options": options_as_json(self.options),
            "names_on_hub": self.names_on_hub,
            "versions": installed_versions(*LIBRARIES),
        }
        checkpoints.save(step, self.parts(), self.random_parts(), state)

    def parts(self) -> dict[str, FlatPart]:
        """{name: the part that this rank saves} of what initialization or training changes."""
        shards = self._shards()
        return {name: FlatPart.share_of(shard, self.world) for name, shard in shards.items()}

    def restore(self, checkpoints: Checkpoints, folder: Path) -> dict[str, Any]:
        """Restore the run from a sound checkpoint. Returns its state.json. A collective.

        Raises:
            UserError: on every rank, if the checkpoint was made on another base model, or by a
                version that chose other layers.
        """
        state = read_state(folder)
        if state["base"] != self.base:
            raise UserError(
                f"{folder} was made on another base model: --model_name_or_path "
                f"{self.options.model.model_name_or_path} does not hold the same weights"
            )
        with self.engine.restoring(state["engine"]):
            parts = {name: FlatPart.of(shard) for name, shard in self._shards().items()}
            random = self.random_parts()
            here = (self.world.size, self.world.device.type)
            same_ranks = (state["world_size"], state["device"]) == here
            names = checkpoints.load(folder, parts | random if same_ranks else parts)
        _check_same_tensors(folder, *names)
        if same_ranks:
            states = {name.rpartition(".")[2]: part.local for name, part in random.items()}
            random_state.restore(states, self.world.device)
        else:  # other dropout than on the same ranks, but not that of the first steps
            seed = f"{self.options.train.seed}:{state['step']}:{self.world.rank}"
            set_seed(zlib.crc32(seed.encode()))
        restore_schedule(self.scheduler, state["schedule"]["last_epoch"])
        if self.runner.merger:
            self.runner.merger.target.restore(state["merges"])
        return state

    def _shards(self) -> dict[str, FlatShard]:
        """{name: shard} of all tensors that initialization or training changes."""
        monitor = self.runner.monitor
        return self._model_shards() | (monitor.shards() if monitor else {})

    def _model_shards(self) -> dict[str, FlatShard]:
        """``_shards`` without the monitor's sketches."""
        shards = {p.name: p.shard for p in self.engine.added_shards()}
        if self.runner.edits_weights:
            loaded = {p.name: p.shard for p in self.engine.base_shards()}
            shards |= {f"{x}.weight": loaded[f"{x}.weight"] for x in self.engine.adapted}
        for name, low in self.runner.low_halves.items():
            shards[f"{name}.low"] = shards[name].like(low)
        for trained in self.engine.trained_shards(gradients=False):
            shards[trained.name] = trained.master
            for moment, shard in zip(("m", "v"), trained.moments, strict=False):
                shards[f"{trained.name}.{moment}"] = shard
        return shards

    def random_parts(self) -> dict[str, FlatPart]:
        """The states of this rank's random generators. Only this rank saves and loads them."""
        states = random_state.capture(self.world.device)
        return {
            f"{RANDOM}{self.world.rank}.{name}": FlatPart(state, 0, state.numel())
            for name, state in states.items()
        }


def restore_schedule(schedule: torch.optim.lr_scheduler.LambdaLR, steps: int) -> None:
    """Set the learning rates for ``steps`` steps taken, by the schedule of this run."""
    rates = [
        base * rate(steps)
        for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    schedule.load_state_dict(
        {"last_epoch": steps, "_step_count": steps + 1, "_last_lr": rates, "lr_lambdas": []}
    )
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _check_same_tensors(folder: Path, missing: Sequence[str], unread: Sequence[str]) -> None:
    """Check that this run's tensors are the checkpoint's. ``unread`` may hold random states."""
    found = [f"{name} is in it" for name in unread if not name.startswith(RANDOM)]
    found += [f"{name} is not in it" for name in missing]
    if found:
        what = (
            "has other random states" if RANDOM in found[0] else "trained or watched other layers"
        )
        raise UserError(
            f"{folder} was saved by a version that {what} ({found[0]}): resume it with that version"
        )


def find_checkpoint(checkpoints: Checkpoints, wanted: str | None) -> Path | None:
    """The sound checkpoint that ``--resume_from_checkpoint`` means. None: start at the beginning.

    A collective.

    Raises:
        UserError: on every rank, if no checkpoint of the run is sound, or if the named one is
            damaged or not a checkpoint's folder.
    """
    if wanted is None:
        return None
    if wanted == "latest":
        found = checkpoints.newest_first()
        for folder in found:
            if not (faults := checkpoints.faults(folder)):
                return folder
            logger.warning("%s cannot be used: %s", folder, "; ".join(faults))
        if found:
            raise UserError(
                f"none of the {len(found)} checkpoints in {checkpoints.output_dir} is sound: "
                "start again with another --output_dir"
            )
        logger.info("no checkpoint in %s yet: starting at the beginning", checkpoints.output_dir)
        return None
    folder = Path(wanted)
    if step_of(folder) is None:
        raise UserError(
            f"--resume_from_checkpoint {wanted}: name a folder checkpoint-<step>, or latest"
        )
    if faults := checkpoints.faults(folder):
        raise UserError(
            f"--resume_from_checkpoint {wanted} cannot be used: {'; '.join(faults)}; "
            "latest takes the newest sound one in output_dir"
        )
    return folder


def check_same_run(folder: Path, options: Options) -> None:
    """Check that a run with ``options`` may resume from the checkpoint ``folder``.

    Warns of other options and library versions that differ. `check_same_data` compares the data.

    Raises:
        UserError: the format differs, or an option that decides what the checkpoint means.
    """
    state = read_state(folder)
    if state.get("format") != FORMAT:
        raise UserError(
            f"{folder} has format {state.get('format')}, and this version reads {FORMAT}: resume "
            "with the version that wrote it, or start again with another --output_dir"
        )
    warnings = []
    for group, saved in state["options"].items():
        for each, declaration in declarations(getattr(options, group)):
            name, after = each.name, getattr(getattr(options, group), each.name)
            before = saved.get(name, default_of(each))  # an older version's run had the default
            if str(before) == str(after) or declaration.resume == "free":
                continue
            if declaration.resume == "fixed":
                raise UserError(
                    f"{folder} was saved with --{name} {before}, and this run has {after}: "
                    f"{_given(name, before)}{ALSO.get(name, '')}"
                )
            warnings.append(f"--{name} was {before} in {folder} and is {after} now")
    for warning in warnings:
        logger.warning("%s: the numbers may change", warning)
    versions = installed_versions(*LIBRARIES)
    for name, before in state["versions"].items():
        if (after := versions.get(name)) != before:
            logger.warning("%s was %s in %s and is %s now", name, before, folder, after)


def _given(name: str, value: Any) -> str:
    """How to give an option that value."""
    if value is None:
        return f"leave out --{name}"
    return f"set --{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def check_same_data(folder: Path, options: Options, checksum: str) -> None:
    """Check that a run has the data of the checkpoint ``folder``.

    Content decides: the same examples in a file of another name are the same data.

    Args:
        checksum: of the run's token ids and labels (`data.identity.checksum`).

    Raises:
        UserError: the checkpoint's run had other token ids or labels, for training or evaluation.
    """
    state, now = read_state(folder), options_as_json(options)["data"]
    if state["data"] != checksum:
        before = state["options"]["data"].items()
        differ = [(name, value) for name, value in before if str(value) != str(now.get(name))]
        advice = [_given(name, value) for name, value in differ]
        advice.append("bring back the data, tokenizer and chat template as they were")
        raise UserError(
            f"{folder} was saved with other data (token ids or labels differ, of training or "
            f"evaluation examples): {', or '.join(advice)}"
        )


def check_no_newer(folder: Path, output_dir: Path, found: Sequence[Path]) -> None:
    """Check that a run resumed from ``folder`` does not write among newer checkpoints.

    Damaged checkpoints do not count: the next save deletes them.

    Raises:
        UserError: ``output_dir`` holds ``folder`` and newer sound checkpoints.
    """
    step = step_of(folder)
    assert step is not None
    if folder.resolve() != checkpoint_folder(output_dir, step).resolve():
        return
    newer = [path.name for path in found if (step_of(path) or 0) > step and is_sound(path)]
    if newer:
        raise UserError(
            f"{output_dir} has newer checkpoints than {folder.name} ({', '.join(newer)}): "
            "give another --output_dir, or delete them"
        )


def options_as_json(options: Options) -> dict[str, Any]:
    return {name: asdict(getattr(options, name)) for name in ("model", "data", "method", "train")}


@torch.no_grad()
def fingerprint(engine: Engine) -> str:
    """A checksum of the loaded weights that does not depend on their sharding.

    It is the sum of their bit patterns as integers, so the order does not matter. One all-reduce.
    """
    total = torch.zeros((), dtype=torch.int64, device=engine.world.device)
    modules = dict(engine.model.named_modules())
    for name, _, shard in engine.base_shards():
        values = FlatPart.share_of(shard, engine.world).local
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and isinstance(module := modules.get(layer), FourBitLinear):
            values = values.view(torch.uint8)  # bytes are the same in any storage dtype
            if engine.world.is_main:  # all ranks hold the same sizes
                total += bits(module.sizes).sum(dtype=torch.int64).to(total.device)
        total += bits(values).sum(dtype=torch.int64).to(total.device)
    dist.all_reduce(total)
    return f"{int(total) & (2**64 - 1):016x}"
