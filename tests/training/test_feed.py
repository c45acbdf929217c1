"""What the ranks say of their data before they train on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from scalora_dist.config.parser import parse_options
from scalora_dist.data import prepare, sources
from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError
from scalora_dist.training.feed import DataFeed, MicroBatches
from scalora_dist.training.resolve import resolve_batch
from scalora_dist.training.trainer import Trainer
from tests.support import runs, stub_flash, tiny_models, tiny_runs
from tests.support.host_reads import HostReads
from tests.support.ranks import Ranks

GetRanks = Callable[[int], Ranks]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


def write(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepared(world: World, cases: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Each rank is a node, and prepares its own case. Returns (checksum or refusal, warnings)."""
    world = replace(world, local_rank=0, nodes=world.size)
    options = parse_options(runs.words(cases[world.rank]))
    options = replace(options, train=resolve_batch(options.train, world.size))
    with tiny_runs.warnings_of() as heard:
        try:
            return DataFeed(options, world).data.checksum, heard
        except UserError as error:
            return str(error), heard


def test_nodes_with_other_data_are_refused(ranks: GetRanks, task: Path, tmp_path: Path) -> None:
    """Other evaluation data too. The same data under another path are taken."""
    case = tiny_runs.options(task, tmp_path / "run", "fsdp", eval_size=0)
    train = write(tmp_path / "train.jsonl", "abc", "abcd", "abcde")
    same = write(tmp_path / "same.jsonl", "abc", "abcd", "abcde")
    other = write(tmp_path / "other.jsonl", "abc", "abdc", "abcde")  # in the middle

    def answers(*files: dict[str, Path]) -> list[str]:
        return [text for text, _ in ranks(2).run(prepared, [{**case, **names} for names in files])]

    (one, two) = answers({"dataset": train}, {"dataset": same})
    assert one == two and len(one) == 32
    for name in ("dataset", "eval_dataset"):
        files = {"dataset": task / "texts.jsonl", name: train}
        for answer in answers(files, {**files, name: other}):
            assert "different data" in answer


def reading(world: World, case: dict[str, Any], nodes: int) -> tuple[int, str]:
    """Prepare the data. Returns (how many data sets this rank has read, checksum)."""
    local_rank = world.rank % (world.size // nodes)
    options = parse_options(runs.words(case))
    options = replace(options, train=resolve_batch(options.train, world.size))
    with patch.object(prepare, "load_examples", wraps=sources.load_examples) as load:
        feed = DataFeed(options, replace(world, local_rank=local_rank, nodes=nodes))
    return load.call_count, feed.data.checksum


def test_one_rank_of_each_node_reads_the_data(ranks: GetRanks, task: Path, tmp_path: Path) -> None:
    """The others read the tokens alone, and neither the data's files nor a hub."""
    case = tiny_runs.options(task, tmp_path / "run", "fsdp", train_batch_size=None, eval_size=0)
    case["eval_dataset"] = write(tmp_path / "evaluation.jsonl", "abc", "abcd")
    for nodes, counts in ((1, [2, 0, 0, 0]), (2, [2, 0, 2, 0])):
        answers = ranks(4).run(reading, case, nodes)
        assert [count for count, _ in answers] == counts
        assert len({checksum for _, checksum in answers}) == 1


def test_evaluation_examples_that_are_trained_on_are_said(
    ranks: GetRanks, task: Path, tmp_path: Path
) -> None:
    case = tiny_runs.options(
        task,
        tmp_path / "run",
        "local",
        dataset=write(tmp_path / "train.jsonl", "abc", "abcd"),
        eval_dataset=write(tmp_path / "evaluation.jsonl", "abcd", "abcde", "abcdef"),
    )
    ((_, warned),) = ranks(1).run(prepared, [case])
    (line,) = [line for line in warned if "evaluation" in line]
    assert line.startswith("1 of 3 evaluation examples are also training examples")


def test_more_workers_than_cores_are_refused(ranks: GetRanks, task: Path, tmp_path: Path) -> None:
    case = tiny_runs.options(task, tmp_path / "run", "local", dataloader_num_workers=100_000)
    ((sentence, status, _),) = ranks(1).run(tiny_runs.refusal, case)
    assert status == 2 and "--dataloader_num_workers 100000" in sentence


def test_chats_are_said_in_the_log_and_the_summary(
    ranks: GetRanks, task: Path, tmp_path: Path
) -> None:
    """The template forgets, so each answer is an example: 2 epochs over 6 of them are 6 steps."""
    model = tmp_path / "model"
    shutil.copytree(task, model)
    (model / "chat_template.jinja").write_text(
        "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    roles = ("user", "assistant", "user", "assistant")
    chat = {"messages": [{"role": role, "content": "abc"} for role in roles], "source": "web"}
    (tmp_path / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 3)
    settings = {
        "max_steps": -1,
        "max_length": 64,
        "num_train_epochs": 2,
        "train_batch_size": 2,
        "per_device_train_batch_size": 2,
        "eval_size": 0,
    }
    case = tiny_runs.options(
        model, tmp_path / "run", "local", dataset=tmp_path / "chats.jsonl", **settings
    )
    ((_, summary, warned),) = ranks(1).run(tiny_runs.train, case)
    assert summary["chat_turns"] == {"each": 6} and summary["steps"] == 6
    assert [line for line in warned if "not used" in line] == ["in the data, but not used: source"]


def reads_of_a_step(
    world: World, case: dict[str, Any], flash: bool = False
) -> tuple[list[str], bool]:
    """What the host reads in a step's forwards and backwards; whether each batch came once."""
    trainer = runs.make(world, case)
    if flash:
        with pytest.MonkeyPatch.context() as patch:
            stub_flash.use(trainer.model, patch)
            return _reads_of_a_step(trainer)
    return _reads_of_a_step(trainer)


def _reads_of_a_step(trainer: Trainer) -> tuple[list[str], bool]:
    world = trainer.world
    accumulation = trainer.options.train.gradient_accumulation_steps
    # Padding them reads their values, on the CPU.
    padded = list(islice(trainer.start(), 2 * accumulation + 1))
    micro_batches = MicroBatches(iter(padded), world.device)
    trainer.engine.module.train()
    targets = trainer.feed.batches.target_tokens(0)
    trainer._accumulate(0, targets, micro_batches)  # the first forward reads the mark
    with HostReads() as reads:
        trainer._accumulate(1, targets, micro_batches)
    trainer.close()
    micro_batches.load_next()  # again, for nothing
    return reads.found, [x.input_ids is padded[-1].input_ids for x in micro_batches] == [True]


@pytest.mark.parametrize(("size", "engine"), [(1, "local"), (2, "fsdp")])
def test_the_host_reads_nothing_while_the_device_computes(
    ranks: GetRanks, task: Path, tmp_path: Path, size: int, engine: str
) -> None:
    """A wait of the host in each micro-batch would leave a GPU idle."""
    case = tiny_runs.options(task, tmp_path / "run", engine, gradient_checkpointing=True)
    for reads, once in ranks(size).run(reads_of_a_step, case):
        assert reads == [] and once


def test_nor_with_flash_attention_in_layers_that_the_backward_repeats(
    ranks: GetRanks, task: Path, tmp_path: Path
) -> None:
    """With one example a micro-batch, transformers asks in each layer whether it is several."""
    sizes = {"per_device_train_batch_size": 1, "train_batch_size": 2}
    case = tiny_runs.options(task, tmp_path / "run", "local", gradient_checkpointing=True, **sizes)
    ((reads, once),) = ranks(1).run(reads_of_a_step, case, True)
    assert reads == [] and once


def taken(world: World, case: dict[str, Any]) -> list[bool]:
    """For each step of a run, whether the next micro-batch is there at its end."""
    trainer = runs.make(world, case)
    micro_batches = trainer.start()
    trainer.engine.module.train()
    found = []
    for step in range(trainer.feed.steps):
        trainer.take_step(step, micro_batches)
        found.append(micro_batches._next is not None)
    trainer.close()
    return found


def test_the_last_step_loads_no_micro_batch_more(
    ranks: GetRanks, task: Path, tmp_path: Path
) -> None:
    case = tiny_runs.options(task, tmp_path / "run", "local", max_steps=3)
    assert ranks(1).run(taken, case) == [[True, True, False]]
