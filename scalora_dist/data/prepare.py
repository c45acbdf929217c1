"""Prepares the training and evaluation data of a run from its arguments."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from scalora_dist.config.data import DataArguments
from scalora_dist.data.generated import PREFIX
from scalora_dist.data.identity import checksum, count_repeated, row_hashes
from scalora_dist.data.sources import load_examples
from scalora_dist.data.tokenize import Tokenized, tokenize_examples
from scalora_dist.errors import UserError


@dataclass(frozen=True)
class Prepared:
    """Tokenized data (columns as in `tokenize_examples`).

    An example that lost all its targets by truncation is in both counts.

    Attributes:
        train: training examples.
        evaluation: evaluation examples, or None.
        truncated: number of truncated examples of both parts.
        dropped: number of examples of both parts that were left out because they have no target.
        repeated: number of evaluation examples whose token ids are also a training example's.
        checksum: 32 hexadecimal digits, the same where both parts have the same ids and labels.
    """

    train: Dataset
    evaluation: Dataset | None
    truncated: int
    dropped: int
    repeated: int
    checksum: str


def prepare_data(args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> Prepared:
    """Load, tokenize and split the data. The result depends on the arguments alone.

    The first call fills the `datasets` cache and later ones read it, so rank 0 should call this
    before the others.

    Raises:
        UserError: a mistake in the arguments or in the data.
    """
    name, options = check_data(args)

    def tokens(name: str, split: str, size: int, task_options: dict[str, Any]) -> Tokenized:
        examples = load_examples(name, split=split, seed=seed, size=size, task_options=task_options)
        return tokenize_examples(
            examples, tokenizer, max_length=args.max_length, train_on_prompt=args.train_on_prompt
        )

    if args.eval_dataset is None:
        data = tokens(name, args.dataset_split, args.dataset_size + args.eval_size, options)
        train, evaluation = _hold_out(data.dataset, args.eval_size, seed)
        truncated, dropped = data.truncated, data.dropped
    else:
        data = tokens(name, args.dataset_split, args.dataset_size, options)
        other = tokens(args.eval_dataset, args.eval_dataset_split, args.eval_size, {})
        train, evaluation = data.dataset, other.dataset
        if args.eval_size:
            evaluation = evaluation.take(min(args.eval_size, len(evaluation)))
        truncated, dropped = data.truncated + other.truncated, data.dropped + other.dropped

    rows = row_hashes(train)
    held_out = row_hashes(evaluation) if evaluation is not None else rows[:0]
    repeated = count_repeated(rows, held_out)
    if args.eval_dataset and repeated == len(held_out) and _overlap(name, args.eval_dataset):
        raise UserError(
            f"{args.eval_dataset} would evaluate on the training examples: leave --eval_dataset "
            "out and let --eval_size hold some out."
        )
    return Prepared(
        train, evaluation, truncated, dropped, repeated, checksum=checksum(rows, held_out)
    )


def _overlap(one: str, other: str) -> bool:
    """Whether two names are the same file, folder or other name, or one folder holds the other."""
    a, b = (Path(name).expanduser().resolve() for name in (one, other))
    return a.is_relative_to(b) or b.is_relative_to(a)


def _hold_out(dataset: Dataset, size: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Split off the end of a shuffled data set.

    Generated data is shuffled too, because some tasks put their harder questions last. All its
    questions are different (see `generated`), so no held-out question occurs in training.
    """
    if size == 0:
        return dataset, None
    if size >= len(dataset):
        raise UserError(
            f"eval_size = {size} leaves nothing to train on: there are {len(dataset)} examples."
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    return dataset.select(order[:-size]), dataset.select(order[-size:])


def check_data(args: DataArguments) -> tuple[str, dict[str, Any]]:
    """`dataset`, and `dataset_options` as a dict.

    Raises:
        UserError: a mistake in the arguments.
    """
    if not args.dataset:
        raise UserError("Say what to train on with --dataset: a file, a folder, or a hub name.")
    try:
        options = json.loads(args.dataset_options)
    except json.JSONDecodeError as error:
        raise UserError(
            f"dataset_options is not JSON ({error}): {args.dataset_options!r}."
        ) from None
    if not isinstance(options, dict):
        raise UserError(
            f"dataset_options must be a JSON object such as {{}}, got {args.dataset_options!r}."
        )
    if options and not args.dataset.startswith(PREFIX):
        raise UserError(f"dataset_options are for {PREFIX}<task> only, not for {args.dataset}.")
    return args.dataset, options
