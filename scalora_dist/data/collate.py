"""Pads examples of different lengths to one rectangular batch, and finds its targets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from scalora_dist.core import host
from scalora_dist.data.prompts import IGNORE


@dataclass(frozen=True)
class Batch:
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

    @classmethod
    def of(cls, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Batch:
        """Find the targets in labels. All tensors are (examples, length) int64 on the CPU."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return cls(input_ids, attention_mask, *find_targets(labels), tokens=int(mask.sum()))

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The arguments of the model's forward."""
        found = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``. The host does not wait."""
        mask = self.attention_mask
        return replace(
            self,
            input_ids=host.to_device(self.input_ids, device),
            attention_mask=None if mask is None else host.to_device(mask, device),
            predicting=host.to_device(self.predicting, device),
            targets=host.to_device(self.targets, device),
        )


def find_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """``Batch.predicting`` and ``Batch.targets`` of labels (examples, length) int64 on the CPU.

    A label is predicted at the token before it. It is no target where it is IGNORE.
    """
    wanted = labels[:, 1:] != IGNORE
    predicting = F.pad(wanted, (0, 1)).flatten().nonzero().squeeze(1)
    return predicting, labels[:, 1:][wanted]


class Collator:
    """Pads on the right to the longest example of the batch.

    It ignores the tokenizer's `padding_side` (a setting for generation): models with absolute
    positions must see each example from position 0 on. The padding is the first of the pad token,
    EOS and id 0 that the model's embedding has a row for. The id does not matter: padding is no
    target, and no token sees it.

    Attributes:
        pad_token_id: the id of the padding.
        masks: whether batches have an attention mask. ``DataFeed.fit`` decides it for a model.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, rows: int, *, masks: bool = True
    ) -> None:
        """
        Args:
            tokenizer: the tokenizer of the examples.
            rows: number of rows of the model's embedding.
            masks: as the attribute.
        """
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_token_id = next(i for i in candidates if i is not None and 0 <= i < rows)
        self.masks = masks

    def __call__(self, examples: list[dict[str, Any]]) -> Batch:
        """Pad examples with ``input_ids`` and ``labels``, lists or arrays of equal length."""
        ids, labels = (
            [torch.tensor(example[name], dtype=torch.int64) for example in examples]
            for name in ("input_ids", "labels")
        )
        mask = None
        if self.masks:
            ones = [torch.ones_like(row) for row in ids]
            mask = pad_sequence(ones, batch_first=True, padding_value=0)
        return Batch(
            pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            mask,
            *find_targets(pad_sequence(labels, batch_first=True, padding_value=IGNORE)),
            tokens=sum(map(len, ids)),
        )


class PaddedExamples(torch.utils.data.Dataset[dict[str, Any]]):
    """A data set that also accepts the index None of `eval_batches`, for a padding example."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        if index is None:
            # One token with attention mask 1: some attention kernels make NaN of an empty row.
            return {"input_ids": [0], "labels": [IGNORE]}
        return self.dataset[index]
