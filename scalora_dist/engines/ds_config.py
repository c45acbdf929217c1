"""Reads DeepSpeed's JSON: fills in "auto" values, refuses settings that break the rescale.

Also decides in which dtype DeepSpeed sums gradients (``sum_gradients_in_fp32``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from scalora_dist.config.shipped import names
from scalora_dist.config.training import TrainArguments
from scalora_dist.errors import UserError

SECTIONS = (
    "bf16",
    "fp16",
    "data_types",
    "tensor_parallel",
    "torch_autocast",
    "zero_optimization",
    "zero_optimization.offload_param",
    "zero_optimization.offload_optimizer",
)
FP32_NAMES = ("fp32", "float32", "float", "torch.float32")  # DeepSpeed knows fp32 by all of these


def load_ds_config(
    path: str, args: TrainArguments, *, world_size: int, hidden_size: int
) -> dict[str, Any]:
    """The DeepSpeed config in the file ``path``, with all "auto" values filled in.

    Args:
        path: the JSON file.
        args: the training options, which decide most "auto" values.
        world_size: number of ranks.
        hidden_size: the model's width, which decides the "auto" sizes of buffers.

    Raises:
        UserError: there is no such file, its JSON is invalid (with the line number), a value
            contradicts the command line, or a merge into shards would go wrong silently, or blocks
            are to be compiled under ZeRO-3.
    """
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(
            f"--ds_config {path}: {error.strerror}; give a file, or one of {names('ds_configs')}"
        ) from error
    except ValueError as error:
        raise UserError(f"--ds_config {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"--ds_config {path} must hold a JSON object")
    _check_sections(config, path)
    _fill(config, args, world_size, hidden_size, path)
    _refuse(config, world_size, path)
    if args.torch_compile and config.get("zero_optimization", {}).get("stage") == 3:
        raise UserError(
            "--torch_compile: ZeRO-3 gathers the weights of each layer inside a block, where "
            "nothing can be compiled across: use --fsdp or ZeRO-2, or leave it out"
        )
    sum_gradients_in_fp32(config, path)
    if left := [key for key, value in _leaves(config) if value == "auto"]:
        raise UserError(f'{path}: nothing decides {left[0]}: write a value instead of "auto"')
    # The optimizer is torch's AdamW on every engine, offloaded or not.
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    return config


def _check_sections(config: dict[str, Any], path: str) -> None:
    """Refuse a section that is not a JSON object. Remove a section that is null."""
    for key in SECTIONS:
        section, name = _section(config, key)
        if section.get(name) is None:
            section.pop(name, None)
        elif not isinstance(section[name], dict):
            raise UserError(f"{path}: {key} must be an object, not {json.dumps(section[name])}")


def _fill(
    config: dict[str, Any], args: TrainArguments, world_size: int, hidden_size: int, path: str
) -> None:
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    decided = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * world_size,
        "gradient_clipping": args.max_grad_norm,
        "bf16.enabled": args.bf16,
        "fp16.enabled": args.fp16,
    }
    for key, value in decided.items():
        section, name = _section(config, key)
        if section.get(name, "auto") not in ("auto", value):
            raise UserError(
                f'{path} sets {key} to {section[name]}, the command line says {value}: set "auto"'
            )
        section[name] = value
    # transformers' Trainer fills in the same values for "auto".
    sized = {
        "zero_optimization.reduce_bucket_size": hidden_size**2,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, value in sized.items():
        section, name = _section(config, key)
        if section.get(name) == "auto":
            section[name] = value


def sum_gradients_in_fp32(config: dict[str, Any], path: str) -> None:
    """Make DeepSpeed sum gradients over micro-batches and ranks in fp32, at stages 2 and 3.

    By itself DeepSpeed sums in the training's dtype. A bf16 number has 8 significant bits. So a
    bf16 sum of hundreds of gradients takes in ever less of each further gradient. A rescale is
    solved from these sums.

    Only trained parameters have gradients. Those of adapters are small. With ``--method full``
    fp32 sums take 4 bytes of a parameter instead of 2, divided by the number of ranks, and twice
    the bytes of a reduction. It is no exception: FSDP2 and one process sum its gradients in fp32
    too, so that engines train alike.

    Stages 0 and 1 keep what the config says. In 16 bits DeepSpeed refuses fp32 sums at stage 0. At
    stage 1 in bf16 it takes another optimizer for them, with whole gradients on every rank.

    Args:
        config: a DeepSpeed config; changed.
        path: the config's file, for the error.

    Raises:
        UserError: the config asks for another dtype at stage 2 or 3.
    """
    if config.get("zero_optimization", {}).get("stage", 0) < 2:
        return
    for key in ("data_types.grad_accum_dtype", "communication_data_type"):
        section, name = _section(config, key)
        given = section.get(name)
        if given not in (None, "auto") and str(given).lower() not in FP32_NAMES:
            raise UserError(
                f"{path}: {key} {given} rounds what the rescale is solved from: remove it, or set "
                '"fp32"'
            )
        section[name] = "fp32"


def compute_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype of the weights under a config of ``load_ds_config``."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(name, {}).get("enabled"):
            return dtype
    return torch.float32


def gradient_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype in which DeepSpeed sums and keeps gradients, for a config of ``load_ds_config``."""
    if config.get("data_types", {}).get("grad_accum_dtype") in FP32_NAMES:
        return torch.float32
    return compute_dtype(config)


def _refuse(config: dict[str, Any], world_size: int, path: str) -> None:
    zero = config.get("zero_optimization", {})
    hpz = zero.get("zero_hpz_partition_size", 1)
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise UserError(f"{path}: zero_optimization.stage {stage}: set 0, 1, 2 or 3")
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise UserError(
                f"{path}: remove the {name!r} block: --learning_rate, --weight_decay, "
                "--lr_scheduler_type and --warmup_ratio decide, alike on every engine"
            )
    bf16, fp16 = (config[name]["enabled"] for name in ("bf16", "fp16"))
    accumulate = config.get("data_types", {}).get("grad_accum_dtype")
    reasons = {
        "fp16 unscales gradients wrongly at stage 0: set stage 1, 2 or 3": (fp16 and stage == 0),
        "round_robin_gradients moves gradients away from their parameters: set it to false": (
            zero.get("round_robin_gradients")
        ),
        "zero_quantized_nontrainable_weights rounds every merge away: set it to false": (
            zero.get("zero_quantized_nontrainable_weights")
        ),
        f"zero_hpz_partition_size {hpz} does not divide {world_size} ranks: set a node's GPUs": (
            not isinstance(hpz, int) or (hpz > 1 and world_size % min(hpz, world_size) != 0)
        ),
        "zero_hpz_partition_size needs stage 3: remove it": hpz not in (0, 1) and stage != 3,
        "zero_quantized_weights rounds what a merge added away: set it to false": (
            zero.get("zero_quantized_weights")
        ),
        "zero_quantized_gradients rounds what the rescale is solved from: set it to false": (
            zero.get("zero_quantized_gradients")
        ),
        "mics_shard_size is not supported: remove it": zero.get("mics_shard_size", -1) != -1,
        "zenflow is not supported: remove it": "zenflow" in zero,
        "offloading needs stage 1, 2 or 3": stage == 0
        and bool({"offload_param", "offload_optimizer"} & zero.keys()),
        "super_offload steps before the rescale: remove it": (
            zero.get("offload_optimizer", {}).get("super_offload")
        ),
        "offload_optimizer.ratio below 1 spreads one buffer over two devices: remove it": (
            zero.get("offload_optimizer", {}).get("ratio", 1) != 1
        ),
        "NVMe offload is not supported: set offload device to cpu": any(
            zero.get(part, {}).get("device") == "nvme"
            for part in ("offload_param", "offload_optimizer")
        ),
        "tensor parallelism is not supported: remove 'tensor_parallel'": (
            config.get("tensor_parallel", {}).get("autotp_size", 0) not in (0, 1)
        ),
        "torch_autocast is not supported: remove it and set --bf16": (
            config.get("torch_autocast", {}).get("enabled")
        ),
        "fp32 gradient accumulation in 16 bits needs stage 2 or 3": (
            (bf16 or fp16) and stage < 2 and accumulate in FP32_NAMES
        ),
        "check_grad_overflow must stay on, so that a non-finite step is skipped": (
            bf16 and config["bf16"].get("check_grad_overflow", True) is False
        ),
        "compute_grad_norm must stay on, so that a non-finite step is skipped": (
            zero.get("compute_grad_norm", True) is False
        ),
        "16-bit master weights would lose the rescale: remove *_master_weights_and_grads": (
            config["bf16"].get("bf16_master_weights_and_grads")
            or config["fp16"].get("fp16_master_weights_and_grads")
        ),
    }
    for reason, broken in reasons.items():
        if broken:
            raise UserError(f"{path}: {reason}")


def _section(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The (nested) object that holds a dotted key, created if missing, and the key's last name."""
    *path, name = key.split(".")
    for part in path:
        config = config.setdefault(part, {})
    return config, name


def _leaves(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for key, value in config.items():
        if isinstance(value, dict):
            leaves += _leaves(value, f"{prefix}{key}.")
        else:
            leaves.append((prefix + key, value))
    return leaves
