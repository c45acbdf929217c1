"""lm-evaluation-harness loads a run's model and adapter, and computes what transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import tiny_models, tiny_runs
from tests.support.ranks import Ranks

NAME = "letters"
# The harness counts blanks at the end of a question to the choice, so the choices begin with them.
DOCS: list[dict[str, Any]] = [
    {"question": "abc", "choices": [" abc abc", " cab", "b"], "answer": 0},
    {"question": "cc", "choices": ["a", "bbca abc", "cba", "c"], "answer": 1},
    {"question": "a b c a b c", "choices": [" a b", " c"], "answer": 0},
]
Likelihoods = list[list[tuple[float, bool]]]  # of each document's choices: log p, and if greedy


def save_task(folder: Path) -> Path:
    """A task of lm-evaluation-harness that needs no hub: the folder of its YAML file."""
    folder.mkdir()
    (folder / "letters.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    task = {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "letters.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{NAME}.yaml").write_text(yaml.safe_dump(task))
    return folder


def by_harness(task: Path, model: Path, **others: Any) -> tuple[Likelihoods, float]:
    """The log-likelihoods that lm-evaluation-harness finds, and its accuracy."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=4, **others),
        tasks=[NAME],
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"][NAME], key=lambda sample: sample["doc_id"])
    return [x["filtered_resps"] for x in samples], found["results"][NAME]["acc,none"]


@torch.no_grad()
def by_transformers(folder: Path) -> Likelihoods:
    """The same, one choice at a time and without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: Likelihoods = []
    for doc in DOCS:
        found.append([])
        prompt = tokenizer.encode(doc["question"], add_special_tokens=False)
        for choice in doc["choices"]:
            ids = tokenizer.encode(f"{doc['question']}{choice}", add_special_tokens=False)
            assert ids[: len(prompt)] == prompt
            logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
            targets = torch.tensor(ids[len(prompt) :])
            logs = logits.log_softmax(-1)[range(len(targets)), targets]
            greedy = bool((logits.argmax(-1) == targets).all())
            found[-1].append((float(logs.sum()), greedy))
    return found


@pytest.mark.heavy
@pytest.mark.parametrize("target", ["weight", "carry"])
def test_lm_eval_finds_the_likelihoods_of_the_trained_model(
    ranks: Callable[[int], Ranks], tmp_path: Path, target: str
) -> None:
    """Of model/, and of adapter/ on the base, which a run with a carry writes too.

    With an adapter the harness cuts the model's tables to the tokenizer's size, so both are equal.
    """
    size = len(tiny_models.byte_tokenizer())
    base, run = tiny_models.save_task(tmp_path / "base", vocab_size=size), tmp_path / "run"
    case = tiny_runs.steady(base, run, "fsdp", merge_target=target, save_model=True, max_steps=40)
    ranks(2).run(tiny_runs.train, case)
    task = save_task(tmp_path / "task")
    ours = by_transformers(run / "model")
    logs = torch.tensor([log for doc in ours for log, _ in doc])
    at_first = torch.tensor([log for doc in by_transformers(base) for log, _ in doc])
    assert (logs - at_first).abs().max() > 0.1, "the run has changed nothing"
    right = [max(range(len(x)), key=lambda i: x[i][0]) for x in ours]
    accuracy = sum(i == doc["answer"] for i, doc in zip(right, DOCS, strict=True)) / len(DOCS)
    found = [by_harness(task, run / "model")]
    if target == "carry":
        found.append(by_harness(task, base, peft=str(run / "adapter")))
    for theirs, their_accuracy in found:
        assert [[greedy for _, greedy in x] for x in theirs] == [[y for _, y in x] for x in ours]
        differences = torch.tensor([log for doc in theirs for log, _ in doc]) - logs
        assert differences.abs().max() < 1e-4
        assert their_accuracy == pytest.approx(accuracy)
