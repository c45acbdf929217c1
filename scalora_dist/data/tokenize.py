"""Converts examples to token ids and labels, once, in the `datasets` cache."""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from scalora_dist.data import prompts
from scalora_dist.data.prompts import Chat, Message, Pair, Shape
from scalora_dist.errors import UserError

IGNORE = -100  # the label that torch's cross entropy skips
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "ids_hash": Value("int64"),
        "labels_hash": Value("int64"),
        "target_tokens": Value("int32"),
        "truncated": Value("bool"),
    }
)


@dataclass(frozen=True)
class Tokenized:
    """Tokenized examples.

    Attributes:
        dataset: token columns.
        truncated: number of truncated examples.
        dropped: number of examples that were left out because they have no target.
    """

    dataset: Dataset
    truncated: int
    dropped: int


def tokenize_examples(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, train_on_prompt: bool
) -> Tokenized:
    """Map raw examples to input_ids and labels (lists of equal length, labels not yet shifted).

    `target_tokens` counts the targets that remain after the causal shift (``labels[1:] != -100``).
    `ids_hash` and `labels_hash` are for `identity`.
    The result is in the `datasets` cache, under a name that depends on the data, the tokenizer, the
    options and this code. A second process with the same arguments only reads it.

    Raises:
        UserError: columns of no known shape, a bad row (with its number, counted from 1), chat data
            whose template is missing or unusable, or no example with a target.
    """
    shape = prompts.recognise(dataset.column_names)
    options = {"max_length": max_length, "train_on_prompt": train_on_prompt}
    # Own fingerprint and file name, for two reasons: `datasets` hashes functions by name, so it
    # would not notice a change of this code. After load_from_disk it would write beside the user's
    # own files.
    code = [Path(file).read_bytes() for file in (__file__, prompts.__file__)]
    fingerprint = Hasher.hash([dataset._fingerprint, tokenizer, options, code])
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "scalora_dist"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        tokenized = dataset.map(
            _tokenize_row,
            with_indices=True,
            fn_kwargs={"shape": shape, "tokenizer": tokenizer, "bos": _bos(tokenizer), **options},
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
            f"max_length = {max_length} tokens."
        )
    return Tokenized(tokenized.select(kept) if dropped else tokenized, truncated, dropped)


def _tokenize_row(
    row: dict[str, Any],
    index: int,
    *,
    shape: Shape,
    tokenizer: PreTrainedTokenizerBase,
    bos: list[int],
    max_length: int,
    train_on_prompt: bool,
) -> dict[str, Any]:
    try:
        example = shape.read(row)
        if isinstance(example, Pair):
            ids, is_target = _encode_pair(example, tokenizer, bos)
        else:
            ids, is_target = _encode_chat(example, tokenizer)
    except UserError as error:
        raise UserError(f"Row {index + 1} of the data set: {error}.") from None
    labels = [
        i if train_on_prompt or hit else IGNORE for i, hit in zip(ids, is_target, strict=True)
    ]
    length = len(ids)
    ids, labels = ids[:max_length], labels[:max_length]
    return {
        "input_ids": ids,
        "labels": labels,
        "ids_hash": _hash(ids),
        "labels_hash": _hash(labels),
        "target_tokens": sum(label != IGNORE for label in labels[1:]),
        "truncated": length > max_length,
    }


def _hash(numbers: list[int]) -> int:
    """64 bits of BLAKE2b of int32 numbers. Any two of a million rows collide with chance 3e-8."""
    digest = blake2b(array("i", numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _encode_pair(
    example: Pair, tokenizer: PreTrainedTokenizerBase, bos: list[int]
) -> tuple[list[int], list[bool]]:
    """Return ids and which of them are targets: ``[BOS] prompt | completion EOS``.

    The two sides are tokenized separately. So no token spans the boundary, and the prompt's ids are
    those that generation will start from. An empty completion has no target, not even EOS: it is
    more often missing data than an intended empty answer.
    """
    prompt = tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
    completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    prompt = bos + prompt
    if tokenizer.eos_token_id is not None and example.completion:
        completion = [*completion, tokenizer.eos_token_id]
    return prompt + completion, [False] * len(prompt) + [True] * len(completion)


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token in a list; empty if the tokenizer puts none before a text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []


def _encode_chat(example: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Return the ids of the rendered chat and which of them are targets.

    The whole chat is tokenized at once, so the ids are those of `apply_chat_template`. A token is a
    target if it starts inside an assistant turn. The template adds BOS and EOS.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "it is a chat, but the tokenizer has no chat template: use an instruct model, or data "
            "of another shape"
        )
    if not tokenizer.is_fast:
        raise UserError("it is a chat, for which the tokenizer must be a fast one")
    messages, first = example.messages, example.first_target
    has_generation = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template())
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        encoding = tokenizer.apply_chat_template(
            messages,
            return_assistant_tokens_mask=bool(has_generation),
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        starts = [start for start, _ in encoding["offset_mapping"]]
        if has_generation:  # the template itself marks the assistant's text
            prompt_end = _prefix_end(messages[:first], text, tokenizer, True) if first else 0
            mask = encoding["assistant_masks"]
            is_target = [bool(m) and s >= prompt_end for m, s in zip(mask, starts, strict=True)]
        else:
            spans = [
                (
                    _prefix_end(messages[:turn], text, tokenizer, True),
                    _prefix_end(messages[: turn + 1], text, tokenizer, False),
                )
                for turn in range(first, len(messages))
                if messages[turn]["role"] == "assistant"
            ]
            is_target = [any(begin <= s < end for begin, end in spans) for s in starts]
    except TemplateError as error:
        raise UserError(f"the chat template refuses it ({error})") from None
    return encoding["input_ids"], is_target


def _prefix_end(
    messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase, prompt: bool
) -> int:
    """Index in the chat's `text` at which the rendering of its first `messages` ends."""
    if not messages:  # the assistant opens the chat: templates cannot render an empty list
        return 0
    prefix = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    if not text.startswith(prefix):
        raise UserError(
            "the tokenizer's chat template renders the first turns differently once more follow, "
            "which hides the assistant's turns: use a template with {% generation %} marks"
        )
    return len(prefix)
