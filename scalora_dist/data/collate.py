"""Pads examples of different lengths to one rectangular batch."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from scalora_dist.data.prompts import IGNORE


class Collator:
    """Pads on the right to the longest example of the batch.

    It ignores the tokenizer's `padding_side` (a setting for generation): models with absolute
    positions must see each example from position 0 on. The padding is the first of the pad token,
    EOS and id 0 that the model's embedding has a row for. The id does not matter: attention mask 0
    and label -100 keep it out of the loss.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        """
        Args:
            tokenizer: the tokenizer of the examples.
            rows: number of rows of the model's embedding.
        """
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_token_id = next(i for i in candidates if i is not None and 0 <= i < rows)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and labels, each int64 (examples, longest)."""
        ids = [torch.tensor(example["input_ids"]) for example in examples]
        labels = [torch.tensor(example["labels"]) for example in examples]
        mask = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence(mask, batch_first=True, padding_value=0),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        }


class PaddedExamples(torch.utils.data.Dataset[dict[str, Any]]):
    """A data set that also accepts the index None of `eval_batches`, for a padding example."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        if index is None:
            # One token with attention mask 1: some attention kernels make NaN of an empty row.
            return {"input_ids": [0], "labels": [IGNORE]}
        return self.dataset[index]
