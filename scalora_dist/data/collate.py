"""Pads examples of different lengths to one rectangular batch, and finds its targets."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from scalora_dist.data.micro_batch import MicroBatch
from scalora_dist.data.prompts import IGNORE


def find_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """``predicting`` and ``targets`` of labels (examples, length) int64 on the CPU.

    A label is predicted at the token before it. It is no target where it is IGNORE.
    """
    wanted = labels[:, 1:] != IGNORE
    predicting = F.pad(wanted, (0, 1)).flatten().nonzero().squeeze(1)
    return predicting, labels[:, 1:][wanted]


def batch_of(input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> MicroBatch:
    """The batch of these tensors, each (examples, length) int64 on the CPU."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return MicroBatch(input_ids, attention_mask, *find_targets(labels), tokens=int(mask.sum()))


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

    def __call__(self, examples: list[dict[str, Any]]) -> MicroBatch:
        """Pad examples with ``input_ids`` and ``labels``, lists or arrays of equal length."""
        ids, labels = (
            [torch.tensor(example[name], dtype=torch.int64) for example in examples]
            for name in ("input_ids", "labels")
        )
        mask = None
        if self.masks:
            ones = [torch.ones_like(row) for row in ids]
            mask = pad_sequence(ones, batch_first=True, padding_value=0)
        return MicroBatch(
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
            # One token, which an attention mask shows, if there is one: some attention kernels make
            # NaN of a row without tokens.
            return {"input_ids": [0], "labels": [IGNORE]}
        return self.dataset[index]
