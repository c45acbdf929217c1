"""The loss on target tokens, as a sum: the trainer divides by the global count of them.

The logits of a whole micro-batch are never in memory: 16 thousand tokens of Gemma-3's vocabulary
would take 17 GB in float32. The LM head itself sums the loss, over a chunk of tokens at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_liger_kernel_available

from scalora_dist.data.tokenize import IGNORE

logger = logging.getLogger(__name__)

# Logits that are in memory at once: 256 MiB in float32, and their gradients as much again.
CHUNK = 2**26
FOR_LIGER = "cuda"  # the device that its kernels are for
MARK = 12345.0  # not a number that a cast to 16 bits leaves alone


class Targets(NamedTuple):
    """
    Attributes:
        loss: cross-entropy summed over the micro-batch's targets, float32 (0 where it has none).
        right: (targets,) whether greedy decoding would produce each, example by example in order;
            None where gradients are taken.
    """

    loss: Tensor
    right: Tensor | None


class TargetLoss:
    """The loss of one model, computed inside its forward, where an engine has the head's weight."""

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()
        self.head: LossHead | None = None
        if type(head) in (nn.Linear, LossHead):
            head.__class__ = LossHead
            self.head = cast(LossHead, head)
        self.checked = False

    def __call__(self, module: nn.Module, batch: Mapping[str, Tensor]) -> Targets:
        """
        Args:
            module: what an engine calls for a forward of the model.
            batch: its inputs, and labels (examples, length) int64, IGNORE where there is no target.
        """
        inputs: dict[str, Any] = {k: v for k, v in batch.items() if k != "labels"}
        if self.head is None:
            logits = module(**inputs, use_cache=False).logits
            return target_losses(logits, batch["labels"])
        with self.head.expecting(batch["labels"]):
            found = module(**inputs, use_cache=False).logits.flatten()
            right = self.head.right
        # Alike on all ranks: what a model does to its logits it does to the mark too.
        if not self.checked and (len(found) != 2 or float(found[1].detach()) != MARK):
            logger.warning("the model changes its logits after the LM head: they are kept whole")
            self.head.__class__ = nn.Linear  # type: ignore[assignment]
            self.head = None
            return self(module, batch)
        self.checked = True
        return Targets(found[0], right)


class LossHead(nn.Linear):
    """An LM head that gives the loss, and a mark, while it is told what to expect."""

    labels: Tensor | None = None
    right: Tensor | None = None

    @contextmanager
    def expecting(self, labels: Tensor) -> Iterator[None]:
        """Inside it, the forward gives [[[loss, MARK]]] in place of logits, and sets ``right``."""
        self.labels = labels
        try:
            yield
        finally:
            self.labels = self.right = None

    def forward(self, input: Tensor) -> Tensor:
        """
        Args:
            input: (examples, length, width).
        """
        if self.labels is None:
            return super().forward(input)
        hidden, wanted = _shifted(input, self.labels)
        if self._fits_liger(hidden):
            loss = self._with_liger(hidden, wanted)
        else:
            loss, self.right = self._in_chunks(hidden, wanted)
        return torch.stack([loss.float(), loss.new_tensor(MARK, dtype=torch.float32)]).view(1, 1, 2)

    def _in_chunks(self, hidden: Tensor, wanted: Tensor) -> Targets:
        rows = max(1, CHUNK // self.out_features)
        chunks = list(zip(hidden.split(rows), wanted.split(rows), strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            parts = [self._one(*chunk) for chunk in chunks]
        else:  # a chunk's logits are computed again in the backward
            parts = [Targets(*checkpoint(self._one, *c, use_reentrant=False)) for c in chunks]
        loss = torch.stack([part.loss for part in parts]).sum()
        right = [part.right for part in parts if part.right is not None]
        return Targets(loss, torch.cat(right) if right else None)

    def _one(self, hidden: Tensor, wanted: Tensor) -> Targets:
        return _cross_entropy(F.linear(hidden, self.weight, self.bias), wanted)

    def _fits_liger(self, hidden: Tensor) -> bool:
        """Whether Liger is here for this device and tensors; it fails where there are none."""
        alike = hidden.dtype == self.weight.dtype and len(hidden) > 0
        here = hidden.device.type == FOR_LIGER and is_liger_kernel_available()
        return torch.is_grad_enabled() and alike and here

    def _with_liger(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """Gradients in the same pass, so that nothing is computed twice."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return loss(self.weight, hidden, wanted, self.bias)


def target_losses(logits: Tensor, labels: Tensor) -> Targets:
    """What whole logits (examples, length, vocabulary) give; ``labels`` as for ``TargetLoss``."""
    return _cross_entropy(*_shifted(logits, labels))


def _shifted(predicting: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(targets, …): what is there a token before each target, and (targets,) the targets."""
    counts = labels[:, 1:] != IGNORE
    return predicting[:, :-1][counts], labels[:, 1:][counts]


def _cross_entropy(logits: Tensor, wanted: Tensor) -> Targets:
    loss = F.cross_entropy(logits.float(), wanted, reduction="sum")
    return Targets(loss, None if torch.is_grad_enabled() else logits.argmax(-1) == wanted)
