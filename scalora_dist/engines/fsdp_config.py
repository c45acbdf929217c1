"""Reads and checks FSDP2's settings from a JSON or YAML file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
import yaml

from scalora_dist.config.shipped import names
from scalora_dist.config.training import TrainArguments
from scalora_dist.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class FSDPConfig:
    """Settings of the FSDP2 engine.

    Attributes:
        mesh: [ranks], or [replicas, ranks of each replica] for hybrid sharding.
        reshard_after_forward: whether to free a block's gathered weights after its forward and
            gather them again for its backward. A number: reshard them to groups of that size.
        param_dtype: dtype in which blocks are gathered and computed; None: the stored dtype.
        reduce_dtype: dtype in which gradients are summed; None: the dtype of the computation.
        cpu_offload: whether parameters, gradients and moments stay on the CPU, with the optimizer
            step there.
    """

    mesh: list[int] = field(default_factory=list)
    reshard_after_forward: bool | int = True
    param_dtype: Optional[torch.dtype] = None
    reduce_dtype: Optional[torch.dtype] = None
    cpu_offload: bool = False


def load_fsdp_config(path: str | None, args: TrainArguments, *, world_size: int) -> FSDPConfig:
    """The settings in the JSON or YAML file at ``path``; the defaults if ``path`` is None.

    By default, blocks are computed in bfloat16 with --bf16, and gradients are summed in float32.

    Raises:
        UserError: there is no such file, its YAML is invalid, a key is unknown, or a value is
            invalid.
    """
    given = _read(path) if path else {}
    known = ["mesh_shape", "reshard_after_forward", "mixed_precision", "cpu_offload"]
    if unknown := [key for key in given if key not in known]:
        raise UserError(f"{path}: unknown key {unknown[0]!r}; the keys are {', '.join(known)}")
    if args.fp16:
        raise UserError("--fp16 needs DeepSpeed's loss scale: set --bf16, or give --ds_config")
    given = {key: value for key, value in given.items() if value is not None}
    config = FSDPConfig(
        mesh=_mesh(given.get("mesh_shape", [world_size]), world_size, path),
        **_mixed_precision(given.get("mixed_precision", {}), args, path),
    )
    for key, kinds in (("reshard_after_forward", (bool, int)), ("cpu_offload", (bool,))):
        if key in given:
            if not isinstance(given[key], kinds):
                raise UserError(f"{path}: {key} {given[key]!r}: set true or false")
            setattr(config, key, given[key])
    group = config.reshard_after_forward
    # In Python True is an int, equal to 1.
    if not isinstance(group, bool) and (group < 2 or config.mesh[-1] % group):
        raise UserError(
            f"{path}: reshard_after_forward {group}: set true, false or a divisor of "
            f"{config.mesh[-1]} ranks"
        )
    return config


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        try:
            given = json.loads(text)
        except json.JSONDecodeError:  # JSON is tried first: YAML forbids the tabs that JSON allows
            given = yaml.safe_load(text)
    except OSError as error:
        raise UserError(
            f"--fsdp_config {path}: {error.strerror}; give a file, or one of {names('fsdp')}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--fsdp_config {path} is neither JSON nor YAML: {reason}") from error
    if not isinstance(given, dict):
        raise UserError(f"--fsdp_config {path} must hold `key: value` lines or a JSON object")
    return given


def _mesh(shape: Any, world_size: int, path: str | None) -> list[int]:
    fits = isinstance(shape, list) and 1 <= len(shape) <= 2
    fits = fits and all(type(side) is int and side > 0 for side in shape)
    if not fits or shape[0] * shape[-1] ** (len(shape) - 1) != world_size:
        raise UserError(
            f"{path}: mesh_shape {shape}: set [{world_size}], or [replicas, ranks of each] whose "
            f"product is the {world_size} ranks"
        )
    return shape


def _mixed_precision(given: Any, args: TrainArguments, path: str | None) -> dict[str, Any]:
    keys = ("param_dtype", "reduce_dtype")
    if not isinstance(given, dict) or set(given) - set(keys):
        raise UserError(f"{path}: mixed_precision takes {' and '.join(keys)}, fp32 or bf16 each")
    dtypes = {"param_dtype": "bf16" if args.bf16 else "fp32", "reduce_dtype": "fp32"} | given
    for key, name in dtypes.items():
        if not isinstance(name, str) or name not in DTYPES:
            raise UserError(f"{path}: mixed_precision.{key} {name!r}: set fp32 or bf16")
    if args.bf16 and dtypes["param_dtype"] != "bf16":
        raise UserError(
            f"{path}: --bf16 keeps weights in bf16: mixed_precision.param_dtype is bf16"
        )
    return {key: DTYPES[name] for key, name in dtypes.items()}
