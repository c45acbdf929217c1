"""Turns batches back into labels, for tests."""

from __future__ import annotations

import numpy as np
import torch

from scalora_dist.data.micro_batch import MicroBatch
from scalora_dist.data.prompts import IGNORE


def arrays(batch: MicroBatch) -> dict[str, np.ndarray]:
    """input_ids, attention_mask and labels, each (examples, length).

    The mask is 1 everywhere where the batch has none.
    """
    ids, mask = batch.input_ids, batch.attention_mask
    labels = torch.full_like(ids, IGNORE)
    labels.view(-1)[batch.predicting + 1] = batch.targets
    mask = torch.ones_like(ids) if mask is None else mask
    return {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "labels": labels.numpy()}
