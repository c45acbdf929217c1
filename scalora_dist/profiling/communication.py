"""Measures how long collectives ran, from torch.profiler's events of one step."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, TypeAlias

import torch

Span: TypeAlias = tuple[int, int]  # start and end, nanoseconds


def communication(
    events: Iterable[Any], start: int, end: int, device: torch.device
) -> tuple[float, float]:
    """Seconds in which a collective ran on this rank, and the part of them that was not overlapped.

    A collective starts when this rank is ready for it, so waiting for a late rank is included. On a
    GPU it is a kernel of NCCL, and other work of the GPU runs beside it. On a CPU it is an
    operation of gloo, and torch's operators run beside it.

    Args:
        events: torch.profiler's events, with kernels on a GPU and operators on a CPU. They are of
            the whole process, so DeepSpeed's and FSDP2's own collectives are included.
        start: start of the measured time, nanoseconds since the epoch.
        end: end of the measured time, nanoseconds since the epoch.
        device: device of this rank.
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
