"""Converts examples to token ids and labels, once, in the `datasets` cache."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from scalora_dist.config.data import DataArguments
from scalora_dist.data.chats import ChatTemplate
from scalora_dist.data.encode import Encoder
from scalora_dist.data.examples import Examples, at
from scalora_dist.data.prompts import IGNORE, Example, Texts, Tokens
from scalora_dist.errors import UserError

FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "ids_hash": Value("int64"),
        "labels_hash": Value("int64"),
        "target_tokens": Value("int32"),
        "truncated": Value("bool"),
        "row": Value("int64"),
        "turns": Value("string"),
        "ignored": Value("string"),
    }
)


@dataclass(frozen=True)
class Tokenized:
    """Tokenized examples.

    Attributes:
        dataset: token columns.
        truncated: number of truncated examples.
        dropped: number of examples that were left out because they have no target.
        turns: {"all", "last" or "each": number of examples that train on these turns of a chat}.
        ignored: names of columns, and of keys of messages, that hold something and were not used.
    """

    dataset: Dataset
    truncated: int
    dropped: int
    turns: dict[str, int]
    ignored: set[str]


def tokenize_examples(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments
) -> Tokenized:
    """Map raw examples to input_ids and labels (lists of equal length, labels not yet shifted).

    A chat can make several examples; ``row`` is the index of its row in ``dataset``.
    `target_tokens` counts the targets that remain after the causal shift (``labels[1:] != -100``).
    `ids_hash` and `labels_hash` are for `identity`.
    The result is in the `datasets` cache, under a name that depends on the data, the tokenizer, the
    options and this code. A second process with the same arguments only reads it.

    Raises:
        UserError: columns of no known layout, a bad row (with its file and number), chat data whose
            template is missing or unusable, or no example with a target.
    """
    examples = Examples(dataset, args)
    # Own fingerprint and file name, for two reasons: `datasets` hashes functions by name, so it
    # would not notice a change of this code. After load_from_disk it would write beside the user's
    # own files.
    code = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    options: list[object] = [args.max_length, args.train_on_prompt, args.chat_turns]
    options += [args.prompt_template, args.completion_template, args.chat_template_kwargs]
    fingerprint = Hasher.hash([dataset._fingerprint, tokenizer, options, code])
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "scalora_dist"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        tokenized = dataset.map(
            _tokenize_rows,
            with_indices=True,
            batched=True,
            fn_kwargs={
                "examples": examples,
                "encoder": Encoder(tokenizer),
                "template": ChatTemplate(
                    tokenizer, args.chat_turns, args.object_of("chat_template_kwargs")
                ),
                "max_length": args.max_length,
                "train_on_prompt": args.train_on_prompt,
            },
            remove_columns=dataset.column_names,
            features=FEATURES,
            cache_file_name=str(cache / f"tokens-{fingerprint}.arrow"),
            load_from_cache_file=True,
            new_fingerprint=fingerprint,
            desc="Tokenizing",
        )
    except UnicodeDecodeError as error:  # pyarrow reads such files without an error
        raise UserError(f"The data set holds text that is not UTF-8 ({error}).") from error
    truncated = int(np.sum(tokenized["truncated"][:]))
    kept = np.flatnonzero(np.asarray(tokenized["target_tokens"][:]))
    dropped = len(tokenized) - len(kept)
    if len(kept) == 0:
        raise UserError(
            "No example has a target token: each completion is empty or lies beyond "
            f"max_length = {args.max_length} tokens."
        )
    ignored = {name for names in tokenized.unique("ignored") for name in names.splitlines()}
    found = tokenized.select(kept) if dropped else tokenized
    turns = Counter(found["turns"][:])
    del turns[""]
    return Tokenized(found, truncated, dropped, dict(turns), ignored)


def _tokenize_rows(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    examples: Examples,
    encoder: Encoder,
    template: ChatTemplate,
    max_length: int,
    train_on_prompt: bool,
) -> dict[str, list[Any]]:
    made: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for number, index in enumerate(indices):
        row = {name: column[number] for name, column in batch.items()}
        columns, example = examples.read(row, index)
        try:
            turns, encoded, ignored = _encode(example, encoder, template)
        except UserError as error:
            raise at(row, index, error) from None
        ignored |= columns.ignored()
        for ids, labels in encoded:
            labels = ids if train_on_prompt else labels
            length = len(ids)
            ids, labels = ids[:max_length], labels[:max_length]
            made["input_ids"].append(ids)
            made["labels"].append(labels)
            made["ids_hash"].append(_hash(ids))
            made["labels_hash"].append(_hash(labels))
            made["target_tokens"].append(sum(label != IGNORE for label in labels[1:]))
            made["truncated"].append(length > max_length)
            made["row"].append(index)
            made["turns"].append(turns)
            made["ignored"].append("\n".join(sorted(ignored)))
    return made


def _encode(
    example: Example, encoder: Encoder, template: ChatTemplate
) -> tuple[str, list[tuple[list[int], list[int]]], set[str]]:
    """Return the trained turns of a chat, ids and labels of each example, and what was ignored."""
    if isinstance(example, Tokens):
        return "", [(example.ids, example.labels)], set()
    if isinstance(example, Texts):
        return "", [_labelled(*encoder.encode_texts(example))], set()
    turns, texts = template.examples(example)
    return (
        turns,
        [_labelled(*encoder.encode_parts(parts)) for parts in texts],
        {*example.ignored, *template.ignored(example)},
    )


def _labelled(ids: list[int], is_target: list[bool]) -> tuple[list[int], list[int]]:
    return ids, [i if hit else IGNORE for i, hit in zip(ids, is_target, strict=True)]


def _hash(numbers: list[int]) -> int:
    """64 bits of BLAKE2b of int32 numbers. Any two of a million rows collide with chance 3e-8."""
    digest = blake2b(array("i", numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
