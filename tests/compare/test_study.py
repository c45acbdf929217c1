"""study.yaml: mistakes are found before anything runs, each told in one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, load_from_disk

from scalora_dist.compare.command import compare_command
from scalora_dist.compare.data import cut_data, data_options
from scalora_dist.compare.runs import Cell, Grid, Run
from scalora_dist.compare.study import Study, method_options, read_study
from scalora_dist.config.method import MethodArguments
from scalora_dist.data.rows import read_row
from scalora_dist.data.sources import load_examples
from scalora_dist.distributed.stop_signals import StopSignals
from scalora_dist.errors import UserError
from tests.support.refusals import one_sentence

GOOD: dict[str, Any] = {
    "common": {"model_name_or_path": "model", "max_steps": 4, "lora_alpha": 8},
    "setups": {"task": {"dataset": "train.jsonl"}},
    "ranks": [2, 8],
    "methods": {
        "LoRA": {"method": "lora"},
        "full": {"method": "full", "learning_rates": [1e-4, 1e-3], "lora_alpha": None},
    },
    "baseline": "LoRA",
    "learning_rates": [1e-3, 3e-3, 1e-2],
}


def read(folder: Path, **changes: Any) -> Study:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    return read_study(str(path))


def test_what_a_study_holds(tmp_path: Path) -> None:
    study = read(tmp_path)
    assert study.cells == [
        Cell("task", "full", None),
        Cell("task", "LoRA", 2),
        Cell("task", "LoRA", 8),
    ]
    final, tuning = (
        Run(study.cells[1], 3e-3, 2000, "final"),
        Run(study.cells[0], 1e-3, 1000, "tune"),
    )
    assert study.options(final) == {
        **{"model_name_or_path": "model", "max_steps": 4, "lora_alpha": 8, "method": "lora"},
        **{"rank": 2, "learning_rate": 3e-3, "seed": 2000, "save_model": False, "save_steps": 0},
    }
    assert not {"rank", "lora_alpha"} & set(study.options(tuning))
    folder = Path("data")
    assert data_options(final, folder) == {
        **{"dataset": "data/task/train", "eval_dataset": "data/task/test"}
    }
    assert data_options(tuning, folder)["eval_dataset"] == "data/task/validation"


def test_rates_outside_a_grid_go_on_with_its_factor() -> None:
    grid = Grid((1e-3, 3e-3, 1e-2))
    assert [grid.rate(position) for position in range(-1, 4)] == [
        *(0.0003162, 1e-3, 3e-3, 1e-2, 0.03162)
    ]


def changed(*path: str, **values: Any) -> Callable[[], dict[str, Any]]:
    """A change of one mapping of the study."""

    def make() -> dict[str, Any]:
        top = yaml.safe_load(yaml.safe_dump(GOOD))
        inner = top
        for key in path:
            inner = inner.setdefault(key, {})
        inner.update(values)
        return top

    return make


MISTAKES = {
    "baseline PiSSA: name one of the methods": changed(baseline="PiSSA"),
    "unknown key 'rank': did you mean ranks": changed(rank=[2]),
    "geometric": changed(learning_rates=[1e-3, 2e-3, 1e-2]),
    "seed cannot be set here; the study sets it": changed("common", seed=3),
    "push_to_hub cannot be set here; the study": changed("common", push_to_hub=True),
    "model_revision cannot be set here; put it": changed("methods", "LoRA", model_revision="v1"),
    "max_steps cannot be set here; put it into common": changed("methods", "LoRA", max_steps=9),
    "full in task: --method full does not read --lora_alpha": changed(
        "methods", "full", lora_alpha=16.5
    ),
    "LoRA in task: unknown option 'lora_alfa'": changed("methods", "LoRA", lora_alfa=1),
    "setups, task: dataset is missing": changed("setups", "task", dataset=None),
    "final_seeds 3: give at least 5": changed(final_seeds=3),
    "use letters": changed("setups", **{"a/b": {"dataset": "x.jsonl"}}),
    "LoRA has no rank that is 3 times one of": changed(
        "against", LoRA={"method": "LoRA", "times_rank": 3}
    ),
    "2 ranks need an engine": changed(gpus_per_run=2),
    "setups None: give a list": changed("methods", "LoRA", setups=None),
    "set train_batch_size in common": changed("methods", "LoRA", gradient_accumulation_steps=2),
    "learning_rates 1e-3: give a list of numbers": changed(learning_rates="1e-3"),
    "learning_rates [True, 2]: give a list of numbers": changed(learning_rates=[True, 2]),
    "methods, LoRA: method is missing": changed("methods", "LoRA", method=None),
    "methods, False: YAML reads this name as a value": changed(methods={False: {}}),
    "only methods with a rank are compared": changed("against", LoRA={"method": "full"}),
    "test_dataset_split is set, but": changed("setups", "task", test_dataset_split="test"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_sentence(message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, **MISTAKES[message]())
    assert message in one_sentence(error)


def test_what_a_run_would_refuse_is_refused_before_any(tmp_path: Path) -> None:
    batches = {"train_batch_size": 7, "per_device_train_batch_size": 2}
    read(tmp_path, common=GOOD["common"] | batches)
    words = [str(tmp_path / "study.yaml"), "--output_dir", str(tmp_path / "out")]
    with StopSignals() as signals, pytest.raises(UserError) as error:
        compare_command(words, signals)
    assert "full, learning rate 0.0001, seed 1000: --train_batch_size 7" in one_sentence(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own_test", [False, True])
def test_no_held_out_example_is_trained_on(own_test: bool, tmp_path: Path) -> None:
    """Each text is there three times, and the test data repeats some of the training data."""
    lines = [f'{{"text": "example {i % 10}", "number": {i}}}\n' for i in range(30)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    (tmp_path / "test.jsonl").write_text("".join(f'{{"text": "example {i}"}}\n' for i in range(4)))
    setup = {"dataset": str(tmp_path / "train.jsonl")}
    if own_test:
        setup["test_dataset"] = str(tmp_path / "test.jsonl")
    study = read(tmp_path, setups={"task": setup}, validation_size=3, test_size=4)
    cut_data(study, study.setups["task"], tmp_path / "task")
    train, validation, test = (
        {read_row(row)["text"] for row in load_from_disk(str(tmp_path / "task" / part))}
        for part in ("train", "validation", "test")
    )
    assert train and validation and test
    assert not train & validation and not test & (train | validation)


def test_examples_are_compared_as_the_set_up_reads_them(tmp_path: Path) -> None:
    """The third column is not read, so two rows are the same example."""
    rows = [f"{i % 20}\t{i % 20}+1\t{i}\n" for i in range(40)]
    (tmp_path / "train.tsv").write_text("".join(rows))
    setup = {
        **{"dataset": str(tmp_path / "train.tsv"), "column_names": ["a", "b", "c"]},
        **{"prompt_template": "{a}: ", "completion_template": "{b}"},
    }
    study = read(tmp_path, setups={"task": setup}, validation_size=3, test_size=4)
    cut_data(study, study.setups["task"], tmp_path / "task")
    parts = {
        part: {read_row(row)["a"] for row in load_from_disk(str(tmp_path / "task" / part))}
        for part in ("train", "validation", "test")
    }
    assert not parts["train"] & parts["validation"] | parts["train"] & parts["test"]
    assert study.setups["task"].options.keys() >= {"prompt_template", "completion_template"}
    assert "column_names" not in study.setups["task"].options


def test_a_bad_row_is_named_by_its_place_before_the_shuffle(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(20)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "good")
    Dataset.from_list([*rows[:7], {"prompt": "p"}]).save_to_disk(tmp_path / "bad")
    setup = {"dataset": str(tmp_path / "good"), "test_dataset": str(tmp_path / "bad")}
    study = read(
        tmp_path,
        setups={"task": setup | {"test_dataset_split": "train"}},
        validation_size=3,
        test_size=4,
    )
    with pytest.raises(UserError, match=r"bad, row 8: the field 'completion' is null"):
        cut_data(study, study.setups["task"], tmp_path / "task")


def test_a_generated_test_part_has_the_options_of_the_training_part(tmp_path: Path) -> None:
    task = {
        **{"dataset": "reasoning_gym:chain_sum", "dataset_size": 20},
        **{"dataset_options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}},
    }
    setup = task | {"test_dataset": "reasoning_gym:chain_sum"}
    study = read(tmp_path, setups={"task": setup}, validation_size=3, test_size=4)
    cut_data(study, study.setups["task"], tmp_path / "task")
    questions = load_from_disk(str(tmp_path / "task" / "test"))["query"][:]
    assert all(len(re.findall(r"\d+", question)) == 2 for question in questions)


def test_other_things_in_the_place_of_cut_data_are_kept(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.txt").write_text("")
    study = read(tmp_path)
    with pytest.raises(UserError) as error:
        cut_data(study, study.setups["task"], tmp_path / "task")
    assert "holds other things" in one_sentence(error)


def test_what_a_method_reads_is_kept_with_its_defaults(tmp_path: Path) -> None:
    methods = {"ScaLoRA": {"method": "scalora"}, "LoRA": {"method": "lora"}}
    study = read(tmp_path, methods=methods)
    runs = {cell.label: Run(cell, 1e-3, 1000, "tune") for cell in study.cells}
    ours, theirs = (method_options(study.options(runs[label])) for label in ("ScaLoRA", "LoRA"))
    assert ours["scaling_rule"] == MethodArguments.scaling_rule
    assert ours["eta_lipschitz"] == pytest.approx(2.4 / (8 / ours["rank"] * ours["rank"] ** 0.5))
    assert theirs == {"method": "lora", "rank": 2, "lora_alpha": 8.0} | theirs
    assert "scaling_rule" not in theirs


def test_data_is_cut_once_and_in_parts_that_share_nothing(tmp_path: Path) -> None:
    texts = [f'{{"text": "example {i}"}}\n' for i in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(texts))
    sizes = {"validation_size": 5, "test_size": 3}
    study = read(tmp_path, setups={"task": {"dataset": str(tmp_path / "train.jsonl")}}, **sizes)
    folder = tmp_path / "data" / "task"

    def parts() -> dict[str, list[str]]:
        names = ("train", "validation", "test")
        return {name: [read_row(row)["text"] for row in load(folder / name)] for name in names}

    def load(path: Path) -> Dataset:
        return load_examples(str(path), split="train", seed=0, size=0, task_options={})

    cut_data(study, study.setups["task"], folder)
    before = parts()
    assert {name: len(part) for name, part in before.items()} == {
        **{"train": 12, "validation": 5, "test": 3}
    }
    assert sorted(chain(*before.values())) == sorted(f"example {i}" for i in range(20))
    (tmp_path / "train.jsonl").write_text("".join(texts[:10]))  # what is cut stays as it is
    cut_data(study, study.setups["task"], folder)
    assert parts() == before
    other = read(tmp_path, setups={"task": {"dataset": str(tmp_path / "train.jsonl")}})
    with pytest.raises(UserError, match="cut otherwise"):
        cut_data(other, other.setups["task"], folder)
    with pytest.raises(UserError, match="too few"):
        cut_data(other, other.setups["task"], tmp_path / "elsewhere")
