"""How long collectives ran, from what torch.profiler saw of one step."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, TypeAlias

import torch

Span: TypeAlias = tuple[int, int]  # from and to, in nanoseconds


def communication(
    events: Iterable[Any], start: int, end: int, device: torch.device
) -> tuple[float, float]:
    """Seconds in which a collective ran on this rank, and those of them in which nothing else did.

    It runs from when this rank is ready for it, so waiting for a late rank is part of it. On a GPU
    it is a kernel of NCCL, and whatever else the GPU does runs beside it; on a CPU it is gloo's,
    and torch's operators run beside it.

    Args:
        events: torch.profiler's, with kernels on a GPU and operators on a CPU; of the whole
            process, so that DeepSpeed's and FSDP2's own collectives are among them.
        start, end: what to look at, in nanoseconds since the epoch.
    """
    collectives: list[Span] = []
    others: list[Span] = []
    on_gpu = device.type == "cuda"
    for event in events:
        if on_gpu and (event.is_user_annotation() or not _is_on_gpu(event)):
            continue
        name = event.name()
        if name.startswith("gloo:") or (on_gpu and "nccl" in name.lower()):
            which = collectives
        elif on_gpu or name.startswith("aten::"):
            which = others
        else:
            continue
        span = max(event.start_ns(), start), min(event.end_ns(), end)
        if span[0] < span[1]:
            which.append(span)
    alone = _covered(chain(collectives, others)) - _covered(others)
    return _covered(collectives) / 1e9, alone / 1e9


def _is_on_gpu(event: Any) -> bool:
    return event.device_type() == torch.autograd.DeviceType.CUDA


def _covered(spans: Iterable[Span]) -> int:
    """Nanoseconds in the union of ``spans``."""
    covered = reached = 0
    for start, end in sorted(spans):
        covered += max(0, end - max(start, reached))
        reached = max(reached, end)
    return covered
