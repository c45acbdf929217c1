from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from scalora_dist.config.data import DataArguments
from scalora_dist.data.identity import checksum, count_repeated, row_hashes
from scalora_dist.data.tokenize import tokenize_examples

TEXTS = ("abc", "de", "fghi")
PAIRS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2=", "completion": "4"}]
CHAT = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]


def hashes(
    rows: Sequence[str | dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    **options: Any,
) -> np.ndarray:
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    found = tokenize_examples(Dataset.from_list(rows), tokenizer, DataArguments(**options))
    return row_hashes(found.dataset)


OTHER = {
    "a token": ("abc", "de", "fgxi"),
    "a row more": (*TEXTS, "jk"),
    "a row less": TEXTS[:2],
    "order": ("de", "abc", "fghi"),
    "a border between rows": ("ab", "cde", "fghi"),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_checksum_sees_a_change_of(tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    tokenizer.eos_token = None  # otherwise another border would give other tokens
    before = hashes(TEXTS, tokenizer)
    assert checksum(before, before[:0]) == checksum(hashes(TEXTS, tokenizer), before[:0])
    assert checksum(hashes(OTHER[what], tokenizer), before[:0]) != checksum(before, before[:0])
    assert checksum(before, hashes(OTHER[what], tokenizer)) != checksum(before, before)


def test_a_checksum_sees_which_part_an_example_is_in(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = hashes(TEXTS, tokenizer)
    found = {checksum(rows[:cut], rows[cut:]) for cut in range(1, 4)}
    assert len(found) == 3


def test_a_checksum_sees_labels_and_truncation_but_not_options(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    def of(**options: Any) -> str:
        rows = hashes(PAIRS, tokenizer, **options)
        return checksum(rows, rows[:0])

    assert of(train_on_prompt=True) != of() == of(max_length=50) != of(max_length=5)


def test_a_checksum_sees_a_chat_template(
    make_tokenizer: Callable[..., PreTrainedTokenizerBase], chat_template: str
) -> None:
    before, same, other = (
        hashes(CHAT, make_tokenizer(template))
        for template in (chat_template, chat_template, chat_template.replace("</s>", "</s>\n"))
    )
    assert checksum(before) == checksum(same) != checksum(other)


def test_selected_rows_have_the_hashes_of_their_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """As held out: a permutation of the cached rows."""
    rows = hashes(TEXTS, tokenizer)
    data = tokenize_examples(
        Dataset.from_list([{"text": text} for text in TEXTS]), tokenizer, DataArguments()
    ).dataset
    assert (row_hashes(data.select([2, 0])) == rows[[2, 0]]).all()
    assert len({int(number) for number in rows.flat}) == len(TEXTS)  # all tokens are targets


def test_repeated_rows_are_counted_whatever_their_targets(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    train = hashes(["1+1=2", "abc", "abc"], tokenizer)
    held_out = hashes([PAIRS[0], {"prompt": "a", "completion": "bc"}, PAIRS[1]], tokenizer)
    assert count_repeated(train, held_out) == 2
    assert count_repeated(train, train) == 3  # every row of the evaluation counts
    assert count_repeated(train, train[:0]) == 0
