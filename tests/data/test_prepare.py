from __future__ import annotations

import json

import pytest
from transformers import HfArgumentParser

from scalora_dist.config.data import DataArguments
from scalora_dist.data.prepare import prepare_data
from scalora_dist.errors import UserError

TASK = "reasoning_gym:chain_sum"
SMALL = '{"min_terms": 2, "max_terms": 2, "max_digits": 1}'  # few questions, so draws repeat


def prepare(tokenizer, seed=0, **fields):
    return prepare_data(DataArguments(**fields), tokenizer, seed)


def texts(dataset, tokenizer) -> list[str]:
    return [tokenizer.decode(row["input_ids"]) for row in dataset]


def refused(tokenizer, **fields) -> str:
    with pytest.raises(UserError) as caught:
        prepare(tokenizer, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def numbers(tmp_path) -> str:
    path = tmp_path / "numbers.jsonl"
    path.write_text(
        "".join(json.dumps({"query": str(i), "response": "x"}) + "\n" for i in range(30))
    )
    return str(path)


def test_held_out_questions_do_not_occur_in_training(tokenizer):
    data = prepare(tokenizer, dataset=TASK, dataset_size=60, dataset_options=SMALL, eval_size=30)
    train, held_out = texts(data.train, tokenizer), texts(data.evaluation, tokenizer)
    assert len(train) == len(set(train)) == 60 and len(held_out) == len(set(held_out)) == 30
    assert not set(train) & set(held_out)
    again = prepare(tokenizer, dataset=TASK, dataset_size=60, dataset_options=SMALL, eval_size=30)
    assert texts(again.train, tokenizer) == train


@pytest.mark.floors
def test_holds_out_of_a_shuffled_file(tokenizer, numbers):
    whole = prepare(tokenizer, dataset=numbers)
    assert len(whole.train) == 30 and whole.evaluation is None
    parts = [prepare(tokenizer, seed, dataset=numbers, eval_size=10) for seed in (0, 0, 1)]
    held_out = [texts(part.evaluation, tokenizer) for part in parts]
    assert held_out[0] == held_out[1] != held_out[2] != texts(whole.train, tokenizer)[20:]
    for part, out in zip(parts, held_out, strict=True):
        assert len(out) == 10
        assert sorted(texts(part.train, tokenizer) + out) == sorted(texts(whole.train, tokenizer))


def test_named_evaluation_data_and_counts(tokenizer, numbers, tmp_path):
    (tmp_path / "other.csv").write_text("text\nabcdefgh\nabc\nabcd\n")
    fields = {"dataset": numbers, "eval_dataset": str(tmp_path / "other.csv"), "max_length": 4}
    data = prepare(tokenizer, **fields)
    # "10\nx</s>" has 5 tokens, and keeps a target; "abcdefgh</s>" has 9, "abcd</s>" has 5
    assert (len(data.train), len(data.evaluation)) == (30, 3)
    assert (data.truncated, data.dropped) == (20 + 2, 0)
    assert len(prepare(tokenizer, eval_size=2, **fields).evaluation) == 2
    data = prepare(tokenizer, **{**fields, "max_length": 3})
    assert (data.truncated, data.dropped) == (30 + 3, 20)


def test_bad_arguments(tokenizer, numbers):
    assert "--dataset" in refused(tokenizer)
    assert "leaves nothing" in refused(tokenizer, dataset=numbers, eval_size=30)
    assert "not JSON" in refused(tokenizer, dataset=TASK, dataset_options="{a}")
    assert "JSON object" in refused(tokenizer, dataset=TASK, dataset_options="[1]")
    assert "reasoning_gym" in refused(tokenizer, dataset=numbers, dataset_options='{"a": 1}')
    assert "--eval_size" in refused(tokenizer, dataset=TASK, eval_dataset=TASK, eval_size=5)
    assert "at least 1" in refused(tokenizer, dataset=numbers, eval_dataset=TASK)
    assert "max_length" in refused(tokenizer, dataset=numbers, max_length=1)
    assert "eval_size" in refused(tokenizer, dataset=numbers, eval_size=-1)


def test_arguments_parse_from_a_command_line():
    (args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(
        [
            "--dataset",
            "d.jsonl",
            "--eval_dataset",
            "e.csv",
            "--train_on_prompt",
            "--max_length",
            "9",
        ]
    )
    assert args == DataArguments(
        dataset="d.jsonl", eval_dataset="e.csv", train_on_prompt=True, max_length=9
    )
