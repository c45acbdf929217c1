from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from scalora_dist.config.data import DataArguments
from scalora_dist.data.prepare import Prepared, prepare_data
from scalora_dist.data.show import show_examples
from scalora_dist.errors import UserError

TASK = "reasoning_gym:chain_sum"
SMALL = '{"min_terms": 2, "max_terms": 2, "max_digits": 1}'  # few questions, so draws repeat


def prepare(tokenizer: PreTrainedTokenizerBase, seed: int = 0, **fields: Any) -> Prepared:
    return prepare_data(DataArguments(**fields), tokenizer, seed)


def texts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(row["input_ids"]) for row in dataset]


def refused(tokenizer: PreTrainedTokenizerBase, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        prepare(tokenizer, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    path = tmp_path / "numbers.jsonl"
    path.write_text(
        "".join(json.dumps({"query": str(i), "response": "x"}) + "\n" for i in range(30))
    )
    return str(path)


def test_held_out_questions_do_not_occur_in_training(tokenizer: PreTrainedTokenizerBase) -> None:
    data = prepare(tokenizer, dataset=TASK, dataset_size=60, dataset_options=SMALL, eval_size=30)
    train, held_out = texts(data.train, tokenizer), texts(data.evaluation, tokenizer)
    assert len(train) == len(set(train)) == 60 and len(held_out) == len(set(held_out)) == 30
    assert not set(train) & set(held_out)
    again = prepare(tokenizer, dataset=TASK, dataset_size=60, dataset_options=SMALL, eval_size=30)
    assert texts(again.train, tokenizer) == train


@pytest.mark.floors
def test_holds_out_of_a_shuffled_file(tokenizer: PreTrainedTokenizerBase, numbers: str) -> None:
    whole = prepare(tokenizer, dataset=numbers)
    assert len(whole.train) == 30 and whole.evaluation is None
    parts = [prepare(tokenizer, seed, dataset=numbers, eval_size=10) for seed in (0, 0, 1)]
    held_out = [texts(part.evaluation, tokenizer) for part in parts]
    assert held_out[0] == held_out[1] != held_out[2] != texts(whole.train, tokenizer)[20:]
    for part, out in zip(parts, held_out, strict=True):
        assert len(out) == 10
        assert sorted(texts(part.train, tokenizer) + out) == sorted(texts(whole.train, tokenizer))


def test_named_evaluation_data_and_counts(
    tokenizer: PreTrainedTokenizerBase, numbers: str, tmp_path: Path
) -> None:
    (tmp_path / "other.csv").write_text("text\nabcdefgh\nabc\nabcd\n")
    fields: dict[str, Any] = {"dataset": numbers, "max_length": 4}
    fields["eval_dataset"] = str(tmp_path / "other.csv")
    data = prepare(tokenizer, **fields)
    assert data.evaluation is not None
    # "10\nx</s>" has 5 tokens, and keeps a target; "abcdefgh</s>" has 9, "abcd</s>" has 5
    assert (len(data.train), len(data.evaluation)) == (30, 3)
    assert (data.truncated, data.dropped) == (20 + 2, 0)
    few = prepare(tokenizer, eval_size=2, **fields).evaluation
    assert few is not None and len(few) == 2
    data = prepare(tokenizer, **{**fields, "max_length": 3})
    assert data.first_dropped == f"{numbers}, row 11"
    assert (data.truncated, data.dropped) == (30 + 3, 20)


SAME_DATA: dict[str, Callable[[Path], Path | str]] = {
    "the file": lambda path: path,
    "a relative path": os.path.relpath,
    "a link": lambda path: path.parent.parent / "link.jsonl",
    "its folder": lambda path: path.parent,
    "the home folder": lambda path: "~/data/numbers.jsonl",
}


@pytest.mark.parametrize("how", SAME_DATA)
def test_training_data_under_another_path_are_refused(
    tokenizer: PreTrainedTokenizerBase,
    numbers: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "data" / "numbers.jsonl"
    path.parent.mkdir()
    Path(numbers).rename(path)
    (tmp_path / "link.jsonl").symlink_to(path)
    fields = {"eval_dataset": str(SAME_DATA[how](path)), "eval_dataset_split": "train"}
    for size in (0, 5):
        assert "--eval_size" in refused(tokenizer, dataset=str(path), eval_size=size, **fields)


def test_slices_of_one_file_are_compared_by_content(
    tokenizer: PreTrainedTokenizerBase, numbers: str
) -> None:
    fields: dict[str, Any] = {"dataset": numbers, "eval_dataset": numbers}
    fields["dataset_split"] = "train[:20]"
    for split, repeated in (("train[20:]", 0), ("test[20:]", 0), ("train[15:25]", 5)):
        assert prepare(tokenizer, eval_dataset_split=split, **fields).repeated == repeated
    assert "--eval_size" in refused(tokenizer, eval_dataset_split="train[5:15]", **fields)


def test_evaluation_examples_that_are_trained_on_are_counted(
    tokenizer: PreTrainedTokenizerBase, numbers: str, tmp_path: Path
) -> None:
    lines = Path(numbers).read_text().splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join([*lines[3:5], lines[3], lines[4].replace("4", "400")]))
    data = prepare(tokenizer, dataset=numbers, eval_dataset=str(other))
    assert data.evaluation is not None
    assert (data.repeated, len(data.evaluation)) == (3, 4)
    other.write_text("".join(lines))  # a copy is no mistake in the options
    assert prepare(tokenizer, dataset=numbers, eval_dataset=str(other)).repeated == 30


def test_held_out_examples_that_occur_twice_are_counted(
    tokenizer: PreTrainedTokenizerBase, numbers: str
) -> None:
    assert prepare(tokenizer, dataset=numbers, eval_size=10).repeated == 0
    Path(numbers).write_text(Path(numbers).read_text() * 2)
    data = prepare(tokenizer, dataset=numbers, eval_size=10)
    train, held_out = texts(data.train, tokenizer), texts(data.evaluation, tokenizer)
    assert data.repeated == sum(text in train for text in held_out) > 0


def test_bad_arguments(tokenizer: PreTrainedTokenizerBase, numbers: str) -> None:
    assert "--dataset" in refused(tokenizer)
    assert "leaves nothing" in refused(tokenizer, dataset=numbers, eval_size=30)
    assert "not JSON" in refused(tokenizer, dataset=TASK, dataset_options="{a}")
    assert "JSON object" in refused(tokenizer, dataset=TASK, dataset_options="[1]")
    assert "reasoning_gym" in refused(tokenizer, dataset=numbers, dataset_options='{"a": 1}')
    assert "--eval_size" in refused(tokenizer, dataset=TASK, eval_dataset=TASK, eval_size=5)
    assert "at least 1" in refused(tokenizer, dataset=numbers, eval_dataset=TASK)
    assert "max_length" in refused(tokenizer, dataset=numbers, max_length=1)
    assert "eval_size" in refused(tokenizer, dataset=numbers, eval_size=-1)


def chats(path: Path, count: int) -> str:
    """Chats of two answers, each with texts of its own."""
    turns = ("user", "assistant", "user", "assistant")
    rows = [
        {"messages": [{"role": role, "content": f"c{i}t{k}"} for k, role in enumerate(turns)]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("turns", ["each", "last", "all"])
def test_all_examples_of_a_held_out_chat_are_held_out(
    chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, turns: str
) -> None:
    """An answer's text is in the later examples of its chat."""
    name = chats(tmp_path / "chats.jsonl", 12)
    data = prepare(chat_tokenizer, dataset=name, eval_size=5, chat_turns=turns)
    assert data.evaluation is not None
    each = 2 if turns == "each" else 1
    assert data.turns == {turns: 12 * each}
    assert (len(data.train), len(data.evaluation)) == (7 * each, 5 * each)
    held_out = "".join(texts(data.evaluation, chat_tokenizer))
    first = [text.split("t0")[0].split("c")[1] for text in texts(data.train, chat_tokenizer)]
    assert len(first) == 7 * each and not any(f"c{i}t" in held_out for i in first)
    assert data.repeated == 0


def test_eval_size_takes_whole_chats_of_named_evaluation_data(
    chat_tokenizer: PreTrainedTokenizerBase, numbers: str, tmp_path: Path
) -> None:
    other = chats(tmp_path / "chats.jsonl", 6)
    fields: dict[str, Any] = {"eval_dataset": other, "eval_size": 2, "chat_turns": "each"}
    data = prepare(chat_tokenizer, dataset=numbers, **fields)
    assert data.evaluation is not None and data.turns == {"each": 12}
    assert [text[8:10] for text in texts(data.evaluation, chat_tokenizer)] == ["c0"] * 2 + [
        "c1"
    ] * 2


def test_what_is_not_used_of_either_part_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    train, other = tmp_path / "train.jsonl", tmp_path / "other.jsonl"
    train.write_text('{"text": "a", "id": 7}\n{"text": "b", "source": "web", "note": null}\n')
    other.write_text('{"text": "c", "split": "x"}\n')
    data = prepare(tokenizer, dataset=str(train), eval_dataset=str(other))
    assert data.ignored == ["id", "source", "split"]


def test_templates_and_their_columns(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text("#1 String\tQuality\na\t1\n")
    fields: dict[str, Any] = {
        "dataset": str(tmp_path / "d.tsv"),
        "prompt_template": r"{#1 String}\n",
    }
    (text,) = texts(prepare(tokenizer, completion_template="{Quality}", **fields).train, tokenizer)
    assert text == "a\n1</s>"
    assert "together" in refused(tokenizer, **fields)
    message = refused(tokenizer, completion_template="{quality}", **fields)
    assert message.endswith(
        "d.tsv, row 1 (line 2): the field 'quality' is missing; there are: #1 String, Quality."
    )


def test_rows_of_two_layouts_are_read_by_file(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    (tmp_path / "b.csv").write_text("question,answer\nq,a\n")
    data = prepare(tokenizer, dataset=str(tmp_path))
    assert texts(data.train, tokenizer) == ["pc</s>", "q\na</s>"]
    (tmp_path / "b.csv").write_text("question,reply\nq,a\n")
    assert "b.csv: the columns question, reply" in refused(tokenizer, dataset=str(tmp_path))


def test_a_bad_row_is_named_with_file_row_line_and_column(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\n\n{"prompt": "p"}\n')
    assert refused(tokenizer, dataset=str(path)) == (
        f"{path}, row 2 (line 3): the field 'completion' is missing; there are: prompt."
    )


def test_examples_are_shown_with_their_targets(
    chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = prepare(chat_tokenizer, dataset=chats(tmp_path / "chats.jsonl", 3))
    whole = "<|user|>c0t0</s><|assistant|>[[c0t1</s>]]<|user|>c0t2</s><|assistant|>[[c0t3</s>]]"
    shown = show_examples(data.train, chat_tokenizer, 1)
    assert shown == f"--- example 1 of 3: 62 tokens, 10 of them targets, in [[ ]]\n{whole}"
    assert len(show_examples(data.train, chat_tokenizer, 9).split("---")) == 4


def test_the_first_row_of_a_file_decides_also_for_its_slices(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "d.jsonl"
    later = '{"prompt": "p", "completion": "c", "text": "t1"}\n'
    path.write_text('{"text": "t0"}\n' + later * 2)
    for split in ("train", "train[1:]"):
        data = prepare(tokenizer, dataset=str(path), dataset_split=split)
        assert texts(data.train, tokenizer)[-1] == "t1</s>"
    path.write_text(later + '{"text": "t0"}\n')
    message = refused(tokenizer, dataset=str(path), dataset_split="train[1:]")
    assert "d.jsonl, row 2: the field 'prompt' is missing" in message


def test_options_without_effect_are_named(
    tokenizer: PreTrainedTokenizerBase, numbers: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "chat_template_kwargs": '{"a": 1}',
        "chat_turns": "each",
        "column_names": ["a"],
        "dataset_size": 5,
        "eval_dataset_config_name": "x",
        "eval_dataset_split": "dev",
    }
    assert prepare(tokenizer, dataset=numbers, **options).without_effect == sorted(options)
    (tmp_path / "d.csv").write_text("text\nb\n")
    data = prepare(tokenizer, dataset=str(tmp_path / "d.csv"), column_names=["text"])
    assert data.without_effect == [] and texts(data.train, tokenizer) == ["b</s>"]


def test_what_a_file_was_read_as_is_said_each_time(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "d.tsv").write_text('text\tn\n"a\t1\nb\t2\n')
    for _ in range(2):  # the second time from the cache
        prepare(tokenizer, dataset=str(tmp_path / "d.tsv"))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("d.tsv: its quotes are read as text" in line for line in said)


def test_names_with_halves_of_characters_do_no_harm(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a", "\\ud83d": 1}\n')
    assert prepare(tokenizer, dataset=str(path)).ignored == ["\\ud83d"]


def test_typed_values_and_those_of_files_make_the_same_text(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = Dataset.from_list([{"day": date(2021, 3, 4), "price": Decimal("1.50"), "n": 4}])
    rows.to_parquet(tmp_path / "d.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for name in ("d.parquet", "saved"):
        data = prepare(
            tokenizer,
            dataset=str(tmp_path / name),
            prompt_template="{n} {day}: ",
            completion_template="{price}",
        )
        assert texts(data.train, tokenizer) == ["4 2021-03-04: 1.50</s>"]
