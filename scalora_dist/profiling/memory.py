"""Measures the peak memory of this process."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

# Peaks in bytes from before a reset of the kernel's or the allocator's count.
_earlier: dict[torch.device, int] = {}


def peak_memory_bytes(device: torch.device) -> int:
    """This process's peak in bytes: CUDA allocator on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        now = torch.cuda.max_memory_allocated(device)
    else:
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(now, _earlier.get(device, 0))


def restart_peak(device: torch.device) -> int | None:
    """The peak in bytes since the last call, then reset; None where the kernel cannot reset it."""
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
