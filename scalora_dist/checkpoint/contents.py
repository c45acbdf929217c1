"""Describes what is in a checkpoint, from its state.json and its tensors' names and sizes.

Imports no engine and no method, and reads no tensor: it needs no ranks and no model.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalora_dist.checkpoint.index import Index
from scalora_dist.checkpoint.manifest import FORMAT, LIBRARIES, RANDOM, STATE, read_state
from scalora_dist.config.data import DataArguments
from scalora_dist.config.method import MethodArguments
from scalora_dist.config.model import ModelArguments
from scalora_dist.config.option import Group, declaration_of, declarations, default_of
from scalora_dist.config.training import TrainArguments
from scalora_dist.model_io.safetensors_writer import DTYPES
from scalora_dist.profiling.versions import installed_versions

GROUPS: dict[str, type[Group]] = {
    "model": ModelArguments,
    "data": DataArguments,
    "method": MethodArguments,
    "train": TrainArguments,
}
# Options that have a line of their own, or say nothing of what was saved.
ELSEWHERE = ("model_name_or_path", "dataset", "method", "output_dir", "resume_from_checkpoint")
LAST_LOSSES = 5
KINDS = (
    *("masters of trained parameters", "AdamW's moments", "W of adapted layers", "carry C and D"),
    *("low halves", "frozen U and V", "sketches of the rank monitor", "random states"),
)
Row = tuple[str, list[str]]  # a name, and one or more lines of text


@dataclass
class Amount:
    """What the tensors of one kind have, over all ranks' files.

    Attributes:
        tensors: number of tensors; one that several ranks hold parts of counts once.
        numbers: number of elements.
        bytes: size in bytes.
    """

    tensors: int = 0
    numbers: int = 0
    bytes: int = 0


def read_whole_state(folder: Path) -> dict[str, Any] | str:
    """The contents of state.json, or a clause that says what is wrong with it."""
    try:
        state: Any = read_state(folder)
    except FileNotFoundError:
        return f"{STATE} is missing"
    except (OSError, ValueError):
        return f"{STATE} cannot be read as JSON"
    if not isinstance(state, dict):
        return f"{STATE} holds no state of a run"
    if state.get("format") != FORMAT:
        return (
            f"{STATE} has format {state.get('format')}, and this version reads {FORMAT}: use the "
            "version that wrote it"
        )
    return state


def describe_state(state: dict[str, Any]) -> list[Row] | str:
    """Rows of a run's state, or a clause that says what is wrong with state.json.

    Args:
        state: contents of state.json, of this version's format.
    """
    try:
        return list(_state_rows(state))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return f"{STATE} does not hold what format {FORMAT} holds"


def _state_rows(state: dict[str, Any]) -> Iterator[Row]:
    options, progress = state["options"], state["progress"]
    model, data, method, train = (options[name] for name in GROUPS)
    yield "format", [str(state["format"])]
    yield "step", [_step(state["step"], progress["tally"]["skipped"], train)]
    yield "saved on", [f"{state['world_size']} rank(s), {state['device']}"]
    yield "method", [_method(method)]
    quantized = f", base in 4 bits ({model['bnb_4bit_quant_type']})"
    dtype = "bfloat16" if train["bf16"] else "float16" if train["fp16"] else "float32"
    yield "dtype", [dtype + (quantized if model["load_in_4bit"] else "")]
    yield "base model", [f"{model['model_name_or_path']} (checksum {state['base']})"]
    yield "data", [f"{data['dataset']} (checksum {state['data']})"]
    yield "options", list(_other_options(options)) or ["all have their defaults"]
    recent = progress["health"]["recent"][-LAST_LOSSES:]
    losses = ["skipped" if loss is None else f"{loss:.4f}" for loss in recent]
    yield f"losses of the last {len(losses)} step(s)", [" ".join(losses)]
    if before := progress["before"]:
        yield "held-out loss before the first step", [f"{_number(before['loss'])}"]
    if scaler := state["engine"].get("loss_scaler"):
        yield "loss scale of fp16", [f"{scaler['cur_scale']:g}"]
    if merges := state["merges"]:
        yield "carry", [_carry(merges, method)]
    yield "versions", list(_versions(state["versions"]))


def _step(step: int, skipped: int, train: dict[str, Any]) -> str:
    total = f"{step:,} of {train['num_train_epochs']:g} epoch(s)"
    if train["max_steps"] > 0:
        total = f"{step:,} of {train['max_steps']:,}"
    return f"{total}, {skipped:,} skipped" if skipped else total


def _method(method: dict[str, Any]) -> str:
    name = str(method["method"])
    if not declaration_of(MethodArguments, "rank").read_by(name):
        return name
    merged = f", merges into its {method['merge_target']}" if method["merge_target"] else ""
    return f"{name}, rank {method['rank']}{merged}"


def _other_options(options: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The options that differ from their defaults, as words of a command line."""
    for group, arguments in GROUPS.items():
        defaults = {each.name: default_of(each) for each, _ in declarations(arguments)}
        for name, value in options[group].items():
            if name in ELSEWHERE or (name in defaults and value == defaults[name]):
                continue
            values = value if isinstance(value, list) else [value]
            yield f"--{name} {shlex.join(map(str, values))}"


def _carry(merges: dict[str, Any], method: dict[str, Any]) -> str:
    used = list(merges["used"].values())
    columns = f"{min(used)} to {max(used)} columns used of {len(used)} layers"
    room = method["carry_rank"] + method["carry_room"]
    lost = max(merges["shares"].values(), default=0.0)
    return f"{columns}, of {room} each; lost at most {lost:.1e} of an update"


def _versions(saved: dict[str, str]) -> Iterator[str]:
    """A line for each library: its version then, and now where it is another."""
    now = installed_versions(*LIBRARIES)
    for name, version in saved.items():
        differs = "" if now.get(name) == version else f" ({now.get(name, 'not installed')} now)"
        yield f"{name} {version}{differs}"


def _number(value: float | None) -> str:
    """JSON has null for a number that is not finite."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"


def kind_of(name: str, names: Container[str]) -> str:
    """Which of ``KINDS`` a tensor is.

    Args:
        name: its name in the checkpoint.
        names: the names of all tensors.
    """
    stem, _, last = name.rpartition(".")
    if name.startswith(RANDOM):
        return "random states"
    if stem.endswith(".sketch"):
        return "sketches of the rank monitor"
    if last in ("m", "v") and stem in names:
        return "AdamW's moments"
    if last == "low" and stem in names:
        return "low halves"
    if f"{name}.m" in names:
        return "masters of trained parameters"
    if last in ("C", "D"):
        return "carry C and D"
    if last in ("U", "V"):
        return "frozen U and V"
    # A run whose every step was skipped has no moments yet.
    return "W of adapted layers" if last == "weight" else "masters of trained parameters"


def tensors_by_kind(folder: Path) -> dict[str, Amount] | str:
    """{kind: its tensors' number and size}, or a clause that says which file cannot be read.

    Reads the checkpoint's index, and no tensor.
    """
    try:
        tensors = Index.read(folder).tensors
    except ValueError as error:
        return str(error)
    amounts = {kind: Amount() for kind in KINDS}
    for name, (dtype, numel, _) in tensors.items():
        amount = amounts[kind_of(name, tensors)]
        amount.tensors += 1
        amount.numbers += numel
        amount.bytes += numel * DTYPES[dtype].itemsize
    return {kind: amount for kind, amount in amounts.items() if amount.tensors}
