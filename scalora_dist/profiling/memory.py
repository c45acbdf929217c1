"""How much memory this process has needed, and what for."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from scalora_dist.adapters.carry import CarryLinear
from scalora_dist.adapters.layers import own_parameters
from scalora_dist.engines.base import Engine

# Peaks that were forgotten by the kernel or the allocator when a new count began.
_earlier: dict[torch.device, int] = {}


def peak_memory_bytes(device: torch.device) -> int:
    """This process's peak: of the CUDA allocator on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        now = torch.cuda.max_memory_allocated(device)
    else:
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(now, _earlier.get(device, 0))


def restart_peak(device: torch.device) -> int | None:
    """The peak in bytes since the last call; None where the kernel keeps no count to begin anew."""
    _earlier[device] = peak_memory_bytes(device)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        status = Path("/proc/self/status").read_text().split()
        Path("/proc/self/clear_refs").write_text("5")
        return int(status[status.index("VmHWM:") + 1]) * 1024
    except (OSError, ValueError):
        return None


def gradient_bytes(engine: Engine) -> int:
    """Of this rank's reduced gradients; inside ``Engine.step`` only."""
    return sum(trained.gradient.local.nbytes for trained in engine.trained())


def state_bytes(engine: Engine, low: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes by part of what this rank keeps from step to step; between steps.

    ``base``: the model's own parameters and buffers. ``low_halves``: of merged 16-bit weights.
    ``carry``: room for merges beside W. ``adapters``: what else the method added. ``masters``: of
    trained parameters; one that is its own master is counted here alone. ``moments``: AdamW's.
    What an engine has besides (buckets, gathered weights) shows in peaks only.

    Args:
        low: {parameter: low halves of its 16-bit values}.
    """
    trained = engine.trained(gradients=False)
    masters = {t.master.local.untyped_storage().data_ptr() for t in trained}
    layers = engine.adapted.values()
    added = {id(p) for layer in layers for p in own_parameters(layer).values()}
    carries = [layer for layer in layers if isinstance(layer, CarryLinear)]
    carried = {id(p) for layer in carries for p in (layer.C, layer.D)}
    kept = dict.fromkeys(("base", "low_halves", "carry", "adapters", "masters", "moments"), 0)
    for p in engine.model.parameters():
        local = engine.places.weight(p).local
        if local.untyped_storage().data_ptr() not in masters:
            part = "carry" if id(p) in carried else "adapters" if id(p) in added else "base"
            kept[part] += local.nbytes
    kept["base"] += sum(buffer.nbytes for buffer in engine.model.buffers())
    kept["low_halves"] = sum(half.nbytes for half in low.values())
    kept["masters"] = sum(t.master.local.nbytes for t in trained)
    kept["moments"] = sum(moment.local.nbytes for t in trained for moment in t.moments)
    return kept
