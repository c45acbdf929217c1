"""The kernels of a step: a GPU starts none before the host has launched it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from scalora_dist.profiling.kernels import KernelCount

# Host's time for one launch, from Python through torch's dispatcher to the driver, on a fast CPU.
LAUNCH_SECONDS = 5e-6
# Launches of a rescale or restart beside one for each merge, at least. The tests compare it with
# every method that merges, by every rule and on every engine. It does not depend on the layers.
BESIDE_MERGES = 40


def optimizer_launches(sizes: Sequence[int]) -> int:
    """Kernels of one step of torch's AdamW.

    Args:
        sizes: elements of each tensor that it steps on this rank.
    """
    parameters = [nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = torch.optim.AdamW(parameters, foreach=True)  # as it does by itself on GPUs
    optimizer.step()  # makes the moments
    with KernelCount("meta") as count:
        optimizer.step()
    return count.total
