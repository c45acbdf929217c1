"""The tasks of the study of small models: answers are right, and every character has a token."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path
from statistics import mean, stdev

import pytest

from tools.small_models import (
    FEW_QUESTIONS,
    STRINGS,
    TABLES,
    TASKS,
    drawn,
    learnt,
    sums,
    tokenizer,
    write_task,
)

COUNT = 50


def right(task: str, question: str, answer: str) -> bool:
    """Whether an answer is right, by another way than the one it was made by."""
    text = question[1:]
    backward = [{new: old for old, new in table.items()} for table in TABLES]
    if task == "substitute":
        return answer.translate(backward[0]) == text
    if task == "cipher":
        return answer[::-1].translate(backward[0]) == text
    if task == "alternate":
        even, odd = answer[::2].translate(backward[0]), answer[1::2].translate(backward[1])
        return even == text[::2] and odd == text[1::2]
    return eval(question) == int(answer)  # the task is sum: digits, + and - alone


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task: str) -> None:
    made = sums(COUNT) if task == "sum" else drawn(STRINGS[task], seed=3)
    examples = list(islice(made, COUNT))
    assert len({question for question, _ in examples}) == COUNT
    if task == "pairs":  # one letter for each pair of letters
        table: dict[str, str] = {}
        for question, answer in examples:
            text = question[1:]
            for pair, letter in zip(
                zip(text, text[1:] + text[0], strict=True), answer, strict=True
            ):
                assert table.setdefault("".join(pair), letter) == letter
        assert len(table) > 30
    else:
        assert all(right(task, *example) for example in examples)
    assert_tokens(examples)


@pytest.mark.parametrize("task", FEW_QUESTIONS)
def test_test_questions_are_as_long_as_those_of_training(task: str, tmp_path: Path) -> None:
    write_task(tmp_path, task)
    lengths = []
    for part in ("test", "train"):
        lines = (tmp_path / task / f"{part}.jsonl").read_text().splitlines()
        lengths.append([len(json.loads(line)["query"]) for line in lines])
    test, train = lengths
    standard_error = stdev(train) * len(test) ** -0.5
    assert abs(mean(test) - mean(train)) < 3 * standard_error


def test_the_tasks_of_pre_training() -> None:
    draw = random.Random(0)
    examples = [learnt(draw) for _ in range(COUNT)]
    for question, answer in examples:
        kind, text = question[0], question[1:]
        if kind == "A":
            assert int(answer) == sum(map(int, text.split("+")))
        elif kind == "N":
            word, letter = text.split(":")
            assert word.count(letter) == int(answer)
        else:
            assert answer == ("".join(sorted(text)) if kind == "S" else text)
    assert {question[0] for question, _ in examples} == set("CSNA")
    assert_tokens(examples)


def assert_tokens(examples: list[tuple[str, str]]) -> None:
    tokens = tokenizer()
    for text in ("\n".join(example) for example in examples):
        ids = tokens(text)["input_ids"]
        assert "".join(tokens.convert_ids_to_tokens(ids)) == f"<s>{text}"
