"""Compares data by content: whether two runs have the same data, and what is in both splits."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from datasets import Dataset


def row_hashes(dataset: Dataset) -> np.ndarray:
    """The hashes of every example's token ids and labels, int64 (examples, 2).

    `tokenize_examples` computes them once, so nobody reads all tokens again.
    """
    columns = dataset.select_columns(["ids_hash", "labels_hash"])[:]
    return np.array([columns["ids_hash"], columns["labels_hash"]], dtype=np.int64).T


def checksum(*parts: np.ndarray) -> str:
    """32 hexadecimal digits that change with any token id, label, border or order of examples.

    Checkpoints hold it, so another way to compute it would refuse all older checkpoints.

    Args:
        parts: `row_hashes` of the training and of the evaluation examples.
    """
    found = blake2b(digest_size=16)
    for hashes in parts:
        found.update(len(hashes).to_bytes(8, "little"))
        found.update(hashes.tobytes())
    return found.hexdigest()


def count_repeated(train: np.ndarray, evaluation: np.ndarray) -> int:
    """Number of evaluation examples whose token ids are also those of a training example.

    Labels do not count: a model that was trained on a text has seen it, whichever part of it was
    the target.

    Args:
        train: `row_hashes` of the training examples.
        evaluation: `row_hashes` of the evaluation examples.
    """
    return int(np.isin(evaluation[:, 0], train[:, 0]).sum())
