"""The loss on target tokens, as a sum: the trainer divides by the global count of them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from scalora_dist.data.tokenize import IGNORE


def target_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The predictions that count, and what they should be.

    Args:
        logits: (examples, length, vocabulary).
        labels: (examples, length) int64, IGNORE where there is no target.

    Returns:
        ((targets, vocabulary) float32, (targets,)), example by example in order.
    """
    counts = labels[:, 1:] != IGNORE
    return logits[:, :-1][counts].float(), labels[:, 1:][counts]


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over this micro-batch's target tokens (0 where it has none)."""
    return F.cross_entropy(*target_logits(logits, labels), reduction="sum")
