"""Trains with activations on the host, on ranks that already run."""

from __future__ import annotations

import gc
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scalora_dist.distributed.world import World
from scalora_dist.modeling import offloaded_activations
from scalora_dist.modeling.offloaded_activations import HostCopies
from tests.support import runs


def train(world: World, options: dict[str, Any]) -> tuple[int, int]:
    """Train, and offload all activations, however small.

    Returns:
        the number of tensors that went to the host, and how many of them were memory of a
        parameter, gathered or not, of any model in this process.
    """
    seen: list[bool] = []
    send = HostCopies.send

    def watched(copies: HostCopies, tensor: Tensor) -> Any:
        seen.append(tensor.untyped_storage().data_ptr() in _of_parameters())
        return send(copies, tensor)

    with (
        patch.object(offloaded_activations, "SMALLEST", 0),
        patch.object(HostCopies, "send", watched),
    ):
        runs.run(world, options)
    return len(seen), sum(seen)


def _of_parameters() -> set[int]:
    """Addresses of the memory of all parameters, also those that FSDP2 has gathered."""
    found = [x for x in gc.get_objects() if isinstance(x, nn.Parameter)]
    plain = [x.to_local() if isinstance(x, DTensor) else x for x in found]
    return {p.untyped_storage().data_ptr() for p in plain if p.numel() and not p.is_meta}
