"""Prepares the training and evaluation data of a run from its arguments."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from scalora_dist.config.data import DataArguments
from scalora_dist.data.files import TABLES, kind_of
from scalora_dist.data.generated import PREFIX
from scalora_dist.data.identity import checksum, count_repeated, row_hashes
from scalora_dist.data.sources import load_examples
from scalora_dist.data.tokenize import read_tokens, write_tokens
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
        first_dropped: where the first of them stands, or "".
        turns: {"all", "last" or "each": number of examples of both parts that train on these turns
            of a chat}.
        endless: number of them that are whole and whose targets have no end token.
        ignored: names of columns, of keys of messages and of variables that were not used.
        without_effect: names of options that were set and had no effect.
        repeated: number of evaluation examples whose token ids are also a training example's.
        checksum: 32 hexadecimal digits, the same where both parts have the same ids and labels.
    """

    train: Dataset
    evaluation: Dataset | None
    truncated: int
    dropped: int
    first_dropped: str
    turns: dict[str, int]
    endless: int
    ignored: list[str]
    without_effect: list[str]
    repeated: int
    checksum: str


@dataclass(frozen=True)
class TokenFiles:
    """Where a tokenized data set is.

    Attributes:
        name: the data set's name in messages.
        files: paths of its files in the `datasets` cache.
        tables: whether it was read from CSV or TSV files.
    """

    name: str
    files: list[str]
    tables: bool


def prepare_data(args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> Prepared:
    """Load, tokenize and split the data. The result depends on the arguments alone.

    Raises:
        UserError: a mistake in the arguments or in the data.
    """
    return split_data(args, tokenize_data(args, tokenizer, seed), seed)


def tokenize_data(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[TokenFiles]:
    """Load and tokenize the data, unless it is in the `datasets` cache.

    One rank of each node calls it, since it may download data from the hub and takes all cores.

    Returns:
        the files of `dataset`, and of `eval_dataset` if there is one.

    Raises:
        UserError: a mistake in the arguments or in the data.
    """
    name, options = check_data(args)

    def tokens(
        name: str, subset: str | None, split: str, size: int, task_options: dict[str, Any]
    ) -> TokenFiles:
        examples = load_examples(
            name,
            split=split,
            config_name=subset,
            column_names=args.column_names,
            seed=seed,
            size=size,
            task_options=task_options,
        )
        files = examples.unique("file") if "raw_json" in examples.column_names else []
        where = f"{name} ({split})" if "[" in split else name
        return TokenFiles(
            where,
            write_tokens(examples, tokenizer, args, where),
            tables=any(kind_of(Path(file)) in TABLES for file in files),
        )

    size = args.dataset_size + (0 if args.eval_dataset else args.eval_size)
    parts = [tokens(name, args.dataset_config_name, args.dataset_split, size, options)]
    if args.eval_dataset is not None:
        subset = args.eval_dataset_config_name
        if subset is None and args.eval_dataset == name:
            subset = args.dataset_config_name
        parts.append(tokens(args.eval_dataset, subset, args.eval_dataset_split, args.eval_size, {}))
    return parts


def split_data(args: DataArguments, written: list[TokenFiles], seed: int) -> Prepared:
    """Read what `tokenize_data` wrote, and split it into training and evaluation examples.

    Raises:
        UserError: no example has a target, or none is left to train or to evaluate on.
    """
    parts = [read_tokens(part.files, args, part.name) for part in written]
    if args.eval_dataset is None:
        train, evaluation = _hold_out(parts[0].dataset, args.eval_size, seed)
    else:
        train, evaluation = (part.dataset for part in parts)
        if args.eval_size:
            evaluation = _of_rows(evaluation, np.unique(evaluation["row"][:])[: args.eval_size])

    turns = sum((Counter(part.turns) for part in parts), Counter())
    ignored = set().union(*(part.ignored for part in parts))
    rows = row_hashes(train)
    held_out = row_hashes(evaluation) if evaluation is not None else rows[:0]
    repeated = count_repeated(rows, held_out)
    if (
        args.eval_dataset
        and repeated == len(held_out)
        and _overlap(str(args.dataset), args.eval_dataset)
    ):
        raise UserError(
            f"{args.eval_dataset} would evaluate on the training examples: leave --eval_dataset "
            "out and let --eval_size hold some out."
        )
    return Prepared(
        train,
        evaluation,
        truncated=sum(part.truncated for part in parts),
        dropped=sum(part.dropped for part in parts),
        first_dropped=next((part.first_dropped for part in parts if part.dropped), ""),
        turns=dict(turns),
        endless=sum(part.endless for part in parts),
        ignored=sorted(ignored),
        without_effect=_without_effect(
            args, has_chats=bool(turns), has_tables=any(part.tables for part in written)
        ),
        repeated=repeated,
        checksum=checksum(rows, held_out),
    )


def _without_effect(args: DataArguments, *, has_chats: bool, has_tables: bool) -> list[str]:
    """Names of the options that are set, but that nothing of this data reads."""
    unread = set()
    if not has_chats:
        unread |= {"chat_turns", "chat_template_kwargs"}
    if not has_tables:
        unread.add("column_names")
    if args.eval_dataset is None:
        unread |= {"eval_dataset_split", "eval_dataset_config_name"}
    if not str(args.dataset).startswith(PREFIX):
        unread.add("dataset_size")
    default = DataArguments()
    return sorted(name for name in unread if getattr(args, name) != getattr(default, name))


def _overlap(one: str, other: str) -> bool:
    """Whether two names are the same file, folder or other name, or one folder holds the other."""
    a, b = (Path(name).expanduser().resolve() for name in (one, other))
    return a.is_relative_to(b) or b.is_relative_to(a)


def _hold_out(dataset: Dataset, size: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Split off the end of a shuffled data set: `size` rows, with all examples made of them.

    Generated data is shuffled too, because some tasks put their harder questions last. All its
    questions are different (see `generated`), so no held-out question occurs in training.
    """
    if size == 0:
        return dataset, None
    rows = np.unique(dataset["row"][:])
    if size >= len(rows):
        raise UserError(
            f"eval_size = {size} leaves nothing to train on: there are {len(rows)} examples."
        )
    order = rows[np.random.default_rng(seed).permutation(len(rows))]
    return _of_rows(dataset, order[:-size]), _of_rows(dataset, order[-size:])


def _of_rows(dataset: Dataset, rows: np.ndarray) -> Dataset:
    """The examples made of some rows, in the order of ``rows``. Those of a row are neighbours."""
    made_of = np.asarray(dataset["row"][:])
    first, last = (np.searchsorted(made_of, rows, side) for side in ("left", "right"))
    count = last - first
    # Each row's examples begin where those of the rows before end.
    shift = np.repeat(first - np.cumsum(count) + count, count)
    return dataset.select(np.arange(count.sum()) + shift)


def check_data(args: DataArguments) -> tuple[str, dict[str, Any]]:
    """`dataset`, and `dataset_options` as a dict.

    Raises:
        UserError: a mistake in the arguments.
    """
    if not args.dataset:
        raise UserError("Say what to train on with --dataset: a file, a folder, or a hub name.")
    options = args.object_of("dataset_options")
    if options and not args.dataset.startswith(PREFIX):
        raise UserError(f"dataset_options are for {PREFIX}<task> only, not for {args.dataset}.")
    return args.dataset, options
