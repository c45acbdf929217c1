"""A padded micro-batch, on the CPU or on the device of a rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scalora_dist.core import host


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch, padded on the right.

    The targets are found on the CPU, where the data is: on a GPU, their number would make the host
    wait for the device.

    Attributes:
        input_ids: (examples, longest) int64.
        attention_mask: (examples, longest) int64, 1 for tokens and 0 for padding; None: the model
            does not need one (``modeling.padding.needs_mask``).
        predicting: indices of the tokens before each target, in the flattened ``input_ids``,
            ascending, (targets,) int64.
        targets: ids that are predicted there, (targets,) int64.
        tokens: number of tokens without padding.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    predicting: Tensor
    targets: Tensor
    tokens: int

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The arguments of the model's forward."""
        found = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, device: torch.device) -> MicroBatch:
        """The batch on ``device``. The host does not wait."""
        mask = self.attention_mask
        return replace(
            self,
            input_ids=host.to_device(self.input_ids, device),
            attention_mask=None if mask is None else host.to_device(mask, device),
            predicting=host.to_device(self.predicting, device),
            targets=host.to_device(self.targets, device),
        )
