"""Trains with activations on the host, on ranks that already run."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scalora_dist.distributed.world import World
from scalora_dist.modeling import offloaded_activations
from scalora_dist.modeling.offloaded_activations import HostCopies, StreamedCopies
from tests.support import runs


def train(world: World, options: dict[str, Any]) -> tuple[int, int]:
    """Train, and offload all activations, however small.

    Returns:
        the number of tensors that went to the host, and how many of them were memory of a
        parameter of the model, gathered or not.
    """
    seen: list[bool] = []
    kind = StreamedCopies if world.device.type == "cuda" else HostCopies
    send = kind.send
    model: list[nn.Module] = []

    def watched(copies: Any, tensor: Tensor) -> Any:
        seen.append(tensor.untyped_storage().data_ptr() in _of_parameters(model[0]))
        return send(copies, tensor)

    with (
        patch.object(offloaded_activations, "SMALLEST", 0),
        patch.object(kind, "send", watched),
    ):
        trainer = runs.make(world, options)
        model.append(trainer.model)
        trainer.run()
    return len(seen), sum(seen)


def _of_parameters(model: nn.Module) -> set[int]:
    """Addresses of the memory of all parameters, as they are now: in part gathered."""
    plain = [x.to_local() if isinstance(x, DTensor) else x for x in model.parameters()]
    return {p.untyped_storage().data_ptr() for p in plain if p.numel() and not p.is_meta}
