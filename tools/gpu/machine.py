"""Writes the devices and versions of this machine to a JSON file."""

from __future__ import annotations

import argparse
import os
import platform
import tomllib
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from scalora_dist.profiling.versions import installed_versions
from scalora_dist.training.run_log import write_json

ROOT = Path(__file__).parents[2]
LIBRARIES = (
    *("scalora_dist", "torch", "triton", "transformers", "accelerate", "peft", "safetensors"),
    *("deepspeed", "datasets", "bitsandbytes", "liger-kernel", "flash-attn", "numpy"),
)


def describe() -> dict[str, Any]:
    """The devices, and the versions of the libraries that are installed."""
    versions = {"python": platform.python_version(), **installed_versions(*LIBRARIES)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = {r.name: r for r in map(Requirement, project["dependencies"])}
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if gpus:
        versions |= {"cuda": str(torch.version.cuda), "nccl": _dotted(torch.cuda.nccl.version())}
    return {
        "device": gpus[0].name if gpus else f"{platform.machine()} CPU",
        "gpus": len(gpus),
        "memory_bytes": gpus[0].total_memory if gpus else 0,
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
        # Such a library may fail where the supported ones do not.
        "unsupported": [
            f"{name} {found} ({supported[name].specifier} is supported)"
            for name, found in versions.items()
            if name in supported and not supported[name].specifier.contains(found, prereleases=True)
        ],
    }


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    write_json(parser.parse_args().json, describe())
