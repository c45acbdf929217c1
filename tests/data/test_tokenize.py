from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from scalora_dist.config.data import DataArguments
from scalora_dist.data.prompts import IGNORE
from scalora_dist.data.tokenize import Tokenized, tokenize_examples
from scalora_dist.errors import UserError


def tokenize(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    **options: Any,
) -> Tokenized:
    return tokenize_examples(Dataset.from_list(rows), tokenizer, DataArguments(**options))


def split(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The whole text, and the text of the targets alone."""
    assert len(row["input_ids"]) == len(row["labels"])
    assert all(t in (IGNORE, i) for t, i in zip(row["labels"], row["input_ids"], strict=True))
    targets = [label for label in row["labels"] if label != IGNORE]
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(targets)


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
USER, BOT, SYSTEM = "user", "assistant", "system"
TALK = messages((SYSTEM, "S"), (USER, "one"), (BOT, "uno"), (USER, "two"), (BOT, "dos"))
RENDERED = "<|system|>S</s><|user|>one</s><|assistant|>uno</s><|user|>two</s><|assistant|>dos</s>"


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "P ", "completion": "C"}, "P ", "C"),
        ({"query": "1+1=", "response": "2"}, "1+1=\n", "2"),
        ({"text": "all of it"}, "", "all of it"),
        (
            {"instruction": "I", "input": "X", "output": "O"},
            ALPACA_WITH_INPUT + "\n\n### Instruction:\nI\n\n### Input:\nX\n\n### Response:\n",
            "O",
        ),
        (
            {"instruction": "I", "input": "", "output": "O"},
            ALPACA + "\n\n### Instruction:\nI\n\n### Response:\n",
            "O",
        ),
        (
            {"instruction": "I", "output": "O"},
            ALPACA + "\n\n### Instruction:\nI\n\n### Response:\n",
            "O",
        ),
        ({"question": "Q?", "answer": "A"}, "Q?\n", "A"),
    ],
)
@pytest.mark.parametrize("bos", [False, True])
def test_text_shapes_mask_all_but_completion_and_eos(
    make_tokenizer: Callable[..., PreTrainedTokenizerBase],
    row: dict[str, Any],
    prompt: str,
    completion: str,
    bos: bool,
) -> None:
    tokenizer = make_tokenizer(bos=bos)
    begin = "<s>" if bos else ""
    (found,) = tokenize([row], tokenizer).dataset
    assert split(found, tokenizer) == (begin + prompt + completion + "</s>", completion + "</s>")
    # The first token of a sequence has nothing before it to predict it from.
    assert found["target_tokens"] == len(completion) + 1 - (begin + prompt == "")
    assert found["target_tokens"] == sum(label != IGNORE for label in found["labels"][1:])

    (found,) = tokenize([row], tokenizer, train_on_prompt=True).dataset
    assert found["labels"] == found["input_ids"]
    assert found["target_tokens"] == len(found["input_ids"]) - 1


def test_chat_trains_every_assistant_turn(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    (row,) = tokenize([{"messages": TALK}], chat_tokenizer).dataset
    assert split(row, chat_tokenizer) == (RENDERED, "uno</s>dos</s>")
    expected = chat_tokenizer.apply_chat_template(TALK, return_dict=False)
    assert row["input_ids"] == expected and row["target_tokens"] == len("uno") + len("dos") + 2


def test_conversational_prompt_completion_trains_the_completion_only(
    chat_tokenizer: PreTrainedTokenizerBase,
) -> None:
    row = {"prompt": TALK[:4], "completion": TALK[4:]}
    (row,) = tokenize([row], chat_tokenizer).dataset
    assert split(row, chat_tokenizer) == (RENDERED, "dos</s>")


def refused(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        tokenize(rows, tokenizer, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_rows_are_named_by_number(
    tokenizer: PreTrainedTokenizerBase, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    good = {"prompt": "p", "completion": "c"}
    message = refused([good, good, {"prompt": "p", "completion": None}], tokenizer)
    assert message == "the data set, row 3: the field 'completion' is null, it must be a string."
    assert "row 1: " in refused([{"query": 1, "response": "x"}], tokenizer)
    assert "row 2: " in refused([{"messages": TALK}, {"messages": []}], chat_tokenizer)
    assert "row 1: " in refused([{"messages": [{"role": "user", "text": "x"}]}], chat_tokenizer)


def test_unknown_columns_are_named_with_the_known_shapes(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    message = refused([{"frage": "q", "antwort": "a"}], tokenizer)
    assert message.startswith("the data set: the columns frage, antwort are no known layout")
    assert "--prompt_template" in message and "query + response" in message and "text" in message


def test_truncated_and_dropped_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        {"prompt": "1234", "completion": "56"},  # 7 tokens: fits
        {"prompt": "1234", "completion": "5678"},  # 9 tokens: loses "8" and EOS
        {"prompt": "1234567", "completion": "8"},  # no target left
        {"prompt": "12", "completion": ""},  # none to begin with
    ]
    result = tokenize(rows, tokenizer, max_length=7)
    assert (result.truncated, result.dropped) == (2, 2)
    assert [split(row, tokenizer) for row in result.dataset] == [
        ("123456</s>", "56</s>"),
        ("1234567", "567"),
    ]
    assert result.dataset["target_tokens"][:] == [3, 3]
    assert result.dataset["truncated"][:] == [False, True]
    assert "--max_length 3" in refused(rows, tokenizer, max_length=3)


def test_text_that_is_not_utf8_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    # pyarrow reads such bytes without a word, and only their use fails
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff\xfe"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        tokenize_examples(Dataset.from_json(str(tmp_path / "d.jsonl")), tokenizer, DataArguments())


PREPARE = """
import sys
from transformers import AutoTokenizer
from scalora_dist.config.data import DataArguments
from scalora_dist.data.prepare import prepare_data

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for name in sys.argv[2:]:
    data = prepare_data(DataArguments(dataset=name, dataset_size=6, eval_size=2), tokenizer, 0)
    print(data.train.to_list(), data.evaluation.to_list())
    tokenizer("use changes a tokenizer's state", truncation=True, max_length=4)
"""


def test_a_second_process_only_reads_the_cache(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = Dataset.from_list([{"messages": TALK[:end]} for end in (3, 5, 3, 5)])
    data.to_json(tmp_path / "d.jsonl")
    data.save_to_disk(tmp_path / "saved")
    names = [tmp_path / "d.jsonl", tmp_path / "saved", "reasoning_gym:chain_sum"]
    cache = tmp_path / "shared"

    def files() -> dict[str, int]:
        found = [*cache.rglob("*.arrow"), *(tmp_path / "saved").rglob("*.arrow")]
        return {str(file): file.stat().st_mtime_ns for file in found}

    def run(hash_seed: int) -> str:
        return subprocess.run(
            [sys.executable, "-c", PREPARE, *map(str, [tmp_path / "tokenizer", *names])],
            env={**os.environ, "HF_DATASETS_CACHE": str(cache), "PYTHONHASHSEED": str(hash_seed)},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    first, before = run(1), files()
    assert len(first.splitlines()) == 3
    tokens = [name for name in before if "tokens-" in name]
    assert len(tokens) == 3 and all(name.startswith(str(cache)) for name in tokens)
    assert run(2) == first and files() == before
