"""Computes the summed loss on target tokens. The trainer divides it by their global count.

The logits of a full micro-batch are never in memory: 16 thousand tokens with Gemma-3's vocabulary
would take 17 GB in float32. Instead, the LM head sums the loss over one chunk of tokens at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_liger_kernel_available

from scalora_dist.core import host
from scalora_dist.data.micro_batch import MicroBatch
from scalora_dist.modeling.padding import whole_rows

logger = logging.getLogger(__name__)

# Number of logits in memory at once: 256 MiB in float32, and their gradients take the same again.
CHUNK = 2**26
FOR_LIGER = "cuda"  # device type of Liger's kernels
MARK = 12345.0  # a cast to 16 bits would change this number


class Targets(NamedTuple):
    """The loss of one micro-batch, and which targets are predicted.

    Attributes:
        loss: cross-entropy summed over the micro-batch's targets, float32 scalar (0 without any).
        right: whether greedy decoding would produce each target, bool (targets,), example by
            example; None if gradients are enabled.
    """

    loss: Tensor
    right: Tensor | None


class TargetLoss:
    """Computes a model's loss inside its forward, where an engine has gathered the head's weight.

    Attributes:
        head: the model's LM head; None: the loss is computed from full logits.
        checked: whether a first forward showed that the model returns the head's output unchanged.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()
        self.head: LossHead | None = None
        if type(head) in (nn.Linear, LossHead):
            head.__class__ = LossHead
            self.head = cast(LossHead, head)
        self.checked = False

    def __call__(self, module: nn.Module, batch: MicroBatch) -> Targets:
        """Compute the loss of one micro-batch, on the model's device. The host does not wait.

        Args:
            module: the engine's module to call for a forward of the model.
            batch: the micro-batch.
        """
        if self.head is None:
            with whole_rows():
                logits = module(**batch.inputs, use_cache=False).logits
            return target_losses(logits, batch)
        with whole_rows(), self.head.expecting(batch):
            found = module(**batch.inputs, use_cache=False).logits.flatten()
            right = self.head.right
        # A model that changes its logits changes the mark too. The same on all ranks.
        if not self.checked and not _is_marked(found):
            logger.warning("the model changes its logits after the LM head: they are kept whole")
            # To mypy, the class of a LossHead is LossHead or below it.
            self.head.__class__ = nn.Linear  # type: ignore[assignment]
            self.head = None
            return self(module, batch)
        self.checked = True
        return Targets(found[0], right)


class LossHead(nn.Linear):
    """An LM head that returns the loss and a mark instead of logits, inside ``expecting``.

    Attributes:
        batch: the current batch; None: return logits.
        right: as in ``Targets``, of the latest forward.
    """

    batch: MicroBatch | None = None
    right: Tensor | None = None

    @contextmanager
    def expecting(self, batch: MicroBatch) -> Iterator[None]:
        """Inside it, the forward returns [[[loss, MARK]]] instead of logits, and sets ``right``."""
        self.batch = batch
        try:
            yield
        finally:
            self.batch = self.right = None

    def forward(self, input: Tensor) -> Tensor:
        """The logits, or inside ``expecting`` [[[loss, MARK]]] (1, 1, 2) float32.

        Args:
            input: hidden states (examples, length, width).
        """
        if self.batch is None:
            return super().forward(input)
        hidden, wanted = _predicting(input, self.batch), self.batch.targets
        if self._fits_liger(hidden):
            loss = self._with_liger(hidden, wanted)
        else:
            loss, self.right = self._in_chunks(hidden, wanted)
        # Filled on the device: a number from the host would make the host wait.
        mark = loss.new_full((), MARK, dtype=torch.float32)
        return torch.stack([loss.float(), mark]).view(1, 1, 2)

    def _in_chunks(self, hidden: Tensor, wanted: Tensor) -> Targets:
        rows = max(1, CHUNK // self.out_features)
        chunks = list(zip(hidden.split(rows), wanted.split(rows), strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            parts = [self._one(*chunk) for chunk in chunks]
        else:  # the backward computes a chunk's logits again
            # Nothing random happens in a chunk.
            again = partial(checkpoint, self._one, use_reentrant=False, preserve_rng_state=False)
            parts = [Targets(*again(*chunk)) for chunk in chunks]
        loss = torch.stack([part.loss for part in parts]).sum()
        right = [part.right for part in parts if part.right is not None]
        return Targets(loss, torch.cat(right) if right else None)

    def _one(self, hidden: Tensor, wanted: Tensor) -> Targets:
        return _cross_entropy(F.linear(hidden, self.weight, self.bias), wanted)

    def _fits_liger(self, hidden: Tensor) -> bool:
        """Whether Liger's kernel can be used. It fails without targets, and needs gradients."""
        alike = hidden.dtype == self.weight.dtype and len(hidden) > 0
        here = hidden.device.type == FOR_LIGER and is_liger_kernel_available()
        return torch.is_grad_enabled() and alike and here

    def _with_liger(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """The loss by Liger, with its gradients in the same pass: no logits are computed twice."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        with _KnownCount(len(wanted)):
            return loss(self.weight, hidden, wanted, self.bias)


class _KnownCount(TorchFunctionMode):
    """Inside it, ``item`` of an integer is the number of targets, and the host does not wait.

    Liger counts the targets that are not ignored. None is, and their sum does not need the number.
    """

    def __init__(self, targets: int) -> None:
        super().__init__()
        self.targets = targets

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.item and not args[0].is_floating_point():
            return self.targets
        return func(*args, **(kwargs or {}))


def target_losses(logits: Tensor, batch: MicroBatch) -> Targets:
    """The loss from a batch's full logits (examples, length, vocabulary)."""
    return _cross_entropy(_predicting(logits, batch), batch.targets)


def _predicting(states: Tensor, batch: MicroBatch) -> Tensor:
    """The hidden states or logits (examples, length, …) before each target: (targets, …)."""
    return states.flatten(0, 1).index_select(0, batch.predicting)


def _is_marked(found: Tensor) -> bool:
    """Whether ``found``, what the model returned, is a loss and the mark."""
    return len(found) == 2 and host.on_host(float, found[1].detach()) == MARK


def _cross_entropy(logits: Tensor, wanted: Tensor) -> Targets:
    loss = F.cross_entropy(logits.float(), wanted, reduction="sum")
    return Targets(loss, None if torch.is_grad_enabled() else logits.argmax(-1) == wanted)
