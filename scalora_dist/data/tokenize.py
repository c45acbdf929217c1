"""Converts examples to token ids and labels, once, in the `datasets` cache."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from scalora_dist.config.data import DataArguments
from scalora_dist.data.chats import ChatTemplate
from scalora_dist.data.encode import Encoder
from scalora_dist.data.examples import Examples
from scalora_dist.data.own_code import own_code
from scalora_dist.data.prompts import IGNORE, Example, Texts, Tokens
from scalora_dist.data.rows import place
from scalora_dist.data.shards import Shards
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
        "place": Value("string"),
        "turns": Value("string"),
        "stops": Value("bool"),
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
        first_dropped: where the first of them stands, or "".
        turns: {"all", "last" or "each": number of examples that train on these turns of a chat}.
        endless: number of examples of chats that are whole and whose targets have no end token.
        ignored: names of columns, and of keys of messages, that hold something and were not used.
    """

    dataset: Dataset
    truncated: int
    dropped: int
    first_dropped: str
    turns: dict[str, int]
    endless: int
    ignored: set[str]


def tokenize_examples(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    name: str = "the data set",
) -> Tokenized:
    """Map raw examples to input_ids and labels (lists of equal length, labels not yet shifted).

    A chat can make several examples; ``row`` is the index of its row in ``dataset``, and ``place``
    says where that is for messages; ``name`` is the data set's name in them.
    `target_tokens` counts the targets that remain after the causal shift (``labels[1:] != -100``).
    `ids_hash` and `labels_hash` are for `identity`.

    Raises:
        UserError: as `write_tokens` and `read_tokens`.
    """
    return read_tokens(write_tokens(dataset, tokenizer, args, name), args, name)


def write_tokens(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments, name: str
) -> list[str]:
    """Tokenize examples into files of the `datasets` cache, and return their paths.

    Their names depend on the data, the tokenizer, the options and this code. A second process with
    the same arguments writes nothing. Large data takes all cores.

    Raises:
        UserError: columns of no known layout, a bad row (with its file and number), chat data whose
            template is missing or unusable.
    """
    examples = Examples(dataset, name, args)
    # Own fingerprint and file name, for two reasons: `datasets` would not notice a change of this
    # code. After load_from_disk it would write beside the user's own files.
    options: list[object] = [name, args.max_length, args.train_on_prompt, args.chat_turns]
    options += [args.prompt_template, args.completion_template, args.chat_template_kwargs]
    fingerprint = Hasher.hash([dataset._fingerprint, tokenizer, options, own_code()])
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "scalora_dist"
    cache.mkdir(parents=True, exist_ok=True)
    variables = args.object_of("chat_template_kwargs")
    convert = partial(
        _tokenize_rows,
        examples=examples,
        encoder=Encoder(tokenizer, args.train_on_prompt),
        template=ChatTemplate(tokenizer, args.chat_turns, variables),
        max_length=args.max_length,
    )
    try:
        return Shards(dataset, convert, FEATURES, cache, fingerprint).write_all()
    except UnicodeDecodeError as error:  # pyarrow reads such files without an error
        raise UserError(f"The data set holds text that is not UTF-8 ({error}).") from error


def read_tokens(files: list[str], args: DataArguments, name: str) -> Tokenized:
    """Read what `write_tokens` wrote.

    Raises:
        UserError: no example has a target.
    """
    tokenized = concatenate_datasets([Dataset.from_file(file) for file in files])
    truncated = int(np.sum(tokenized["truncated"][:]))
    has_targets = np.asarray(tokenized["target_tokens"][:]) > 0
    kept, gone = np.flatnonzero(has_targets), np.flatnonzero(~has_targets)
    if len(kept) == 0:
        raise UserError(
            f"No example of {name} has a target token: completions are empty, or lie beyond "
            f"--max_length {args.max_length}, or no turn of the role assistant is to be trained "
            "on, or all labels are -100."
        )
    ignored = {name for names in tokenized.unique("ignored") for name in names.splitlines()}
    found = tokenized.select(kept) if len(gone) else tokenized
    turns = Counter(found["turns"][:])
    del turns[""]
    endless = sum(turns.values()) - int(np.sum(found["stops"][:]))
    first_dropped = tokenized[int(gone[0])]["place"] if len(gone) else ""
    return Tokenized(found, truncated, len(gone), first_dropped, dict(turns), endless, ignored)


def _tokenize_rows(
    batch: dict[str, list[Any]],
    indices: list[int],
    offset: int,
    *,
    examples: Examples,
    encoder: Encoder,
    template: ChatTemplate,
    max_length: int,
) -> dict[str, list[Any]]:
    made: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for number, in_shard in enumerate(indices):
        index = offset + in_shard
        row = {name: column[number] for name, column in batch.items()}
        columns, example = examples.read(row, index)
        try:
            encoded = _encode(example, encoder, template)
            names = "\n".join(sorted(encoded.ignored | columns.ignored()))
            # A name can hold halves of characters, which Arrow refuses.
            ignored = names.encode(errors="backslashreplace").decode()
            where = place(row, index, examples.name)
            beyond = False
            for encode in encoded.examples:
                # The prompts of later turns are longer still.
                ids, labels = ([], []) if beyond else encode()
                length = len(ids)
                ids, labels = ids[:max_length], labels[:max_length]
                targets = sum(label != IGNORE for label in labels[1:])
                is_cut = beyond or length > max_length
                beyond = is_cut and targets == 0
                made["input_ids"].append(ids)
                made["labels"].append(labels)
                made["ids_hash"].append(_hash(ids))
                made["labels_hash"].append(_hash(labels))
                made["target_tokens"].append(targets)
                made["truncated"].append(is_cut)
                made["row"].append(index)
                made["place"].append(where)
                made["turns"].append(encoded.turns)
                ends = is_cut or not encoder.special.isdisjoint(labels)
                made["stops"].append(bool(encoded.turns) and ends)
                made["ignored"].append(ignored)
        except UserError as error:
            raise examples.at(row, index, error) from None
    return made


@dataclass(frozen=True)
class _Encoded:
    """What a row makes.

    Attributes:
        examples: functions that return ids and labels of an example; each is longer than the one
            before.
        turns: the trained turns of a chat, or "".
        ignored: names of what has no effect.
    """

    examples: list[Callable[[], tuple[list[int], list[int]]]]
    turns: str = ""
    ignored: frozenset[str] = frozenset()


def _encode(example: Example, encoder: Encoder, template: ChatTemplate) -> _Encoded:
    if isinstance(example, Texts):
        return _Encoded([partial(encoder.encode_texts, example)])
    if isinstance(example, Tokens):
        if encoder.train_on_prompt and IGNORE in example.labels:
            raise UserError("it has labels, so --train_on_prompt cannot be used")
        return _Encoded([lambda: (example.ids, example.labels)])
    if encoder.train_on_prompt and example.excludes:
        raise UserError("it sets weight or train of a turn, so --train_on_prompt cannot be used")
    made = template.examples(example)
    texts = [partial(encoder.encode_parts, text) for text in made.texts]
    return _Encoded([*texts], made.turns, example.ignored | made.ignored)


def _hash(numbers: list[int]) -> int:
    """64 bits of BLAKE2b of int32 numbers. Any two of a million rows collide with chance 3e-8."""
    digest = blake2b(array("i", numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
