"""∇W of sharded weights against plain autograd, and that nothing else has changed."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from scalora_dist.methods.init.groups import Budget
from tests.support import runs, tiny_models
from tests.support.ranks import Ranks
from tests.support.workers import gradients as gradient_work
from tests.support.workers.gradients import Found, Rows

GetRanks = Callable[[int], Ranks]

GLOBAL_BATCH = 12
SMALL, LARGE = 4000, 2**30  # bytes: a layer or two at a time, all of them
BUDGETS = [Budget(SMALL), Budget(LARGE), Budget(0, LARGE), Budget(SMALL, 2 * SMALL)]
TOLERANCE = 1e-5  # of a layer's largest entry
TASK = {
    "train_batch_size": GLOBAL_BATCH,
    "max_length": 32,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "method": "lora",
    "rank": 4,
    "save_model": False,
    "save_steps": 0,
    "update_rank_layers": 0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save_odd_model(folder, "llama")
    tiny_models.save_texts(folder, string.ascii_letters, longest=32, count=40)
    return folder


def task(model: Path, folder: Path, size: int, engine: str, **others: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": model,
        "dataset": model / "texts.jsonl",
        "output_dir": folder / "run",
        "per_device_train_batch_size": GLOBAL_BATCH // (2 * size),  # two micro-batches a step
        **TASK,
        **runs.engine_options(engine, folder),
        **others,
    }


def dense(model: Path, answers: list[Found]) -> dict[str, np.ndarray]:
    """∇W (m, n) float64 of every layer, by autograd on one whole model that trains W."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for batch in (batch for answer in answers for batch in answer.batches):
        ids, mask, labels = (
            torch.tensor(batch[k]) for k in ("input_ids", "attention_mask", "labels")
        )
        logits = whole(input_ids=ids, attention_mask=mask, use_cache=False).logits
        total = total + F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        targets += int((labels[:, 1:] != -100).sum())
    (total / targets).backward()
    found = {}
    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert module.weight.grad is not None
            found[name] = module.weight.grad.numpy()
    return found


def assemble(by_rank: list[Rows]) -> dict[str, np.ndarray]:
    """The ranks' rows put together, which must be those that torch.chunk cuts."""
    whole = {}
    for name in by_rank[0]:
        parts = [rows[name] for rows in by_rank]
        m, n = parts[0][1]
        share = -(-m // len(by_rank))
        for rank, (offset, shape, local) in enumerate(parts):
            assert shape == (m, n)
            assert offset == min(rank * share, m) * n
            assert len(local) == len(range(m)[rank * share : (rank + 1) * share]) * n
        whole[name] = np.concatenate([local for _, _, local in parts]).reshape(m, n)
    return whole


def check(model: Path, answers: list[Found]) -> None:
    expected, ours = dense(model, answers), assemble([answer.rows for answer in answers])
    assert list(ours) == list(expected)  # model order
    for name, gradient in expected.items():
        error = np.abs(ours[name] - gradient).max() / np.abs(gradient).max()
        assert error < TOLERANCE, f"{name}: {error:.1e}"


# Two micro-batches a step and rank everywhere.
CASES = [
    (1, "local", False, "lora"),
    (2, "zero0", False, "lora"),
    (2, "zero2", False, "lora"),
    (2, "zero3", False, "lora"),
    (2, "zero3", True, "lora"),
    (2, "zero3", False, "peft-lora"),  # DeepSpeed has other hooks on PEFT's layers
    (2, "fsdp", False, "lora"),
    (2, "fsdp", True, "lora"),
    (3, "zero3", True, "lora"),
]


@pytest.mark.parametrize(("size", "engine", "checkpointing", "method"), CASES)
def test_gradients_are_those_of_the_whole_model(
    ranks: GetRanks,
    model: Path,
    tmp_path: Path,
    size: int,
    engine: str,
    checkpointing: bool,
    method: str,
) -> None:
    """In several passes and in one, with sums on the device and on the host: the same numbers.

    One layer's whole gradient is held at a time. Nothing is left.
    """
    options = task(
        model, tmp_path, size, engine, gradient_checkpointing=checkpointing, method=method
    )
    by_rank = ranks(size).run(gradient_work.gradients, options, BUDGETS, loss_scale=2.0**10)
    for first, *others in by_rank:
        for name, (_, _, local) in first.rows.items():
            assert all(np.array_equal(other.rows[name][2], local) for other in others)
    for budget, *answers in zip(BUDGETS, *by_rank, strict=True):
        check(model, answers)
        for answer in answers:
            assert not answer.left
            shapes = {name: shape for name, (_, shape, _) in answer.rows.items()}
            shares = {name: 4 * -(-m // size) * n for name, (m, n) in shapes.items()}  # bytes
            assert (answer.sent, answer.whole) == (size * max(shares.values()) // 4, 1)
            sums = [[shares[name] for name in names] for names in answer.passes]
            assert all(sum(group) <= sum(budget) or len(group) == 1 for group in sums)
            assert len(sums) == answer.forwards / 2 and (len(sums) == 1) == (LARGE in budget)
            assert (answer.blocks > answer.forwards) == checkpointing


@pytest.mark.parametrize(
    ("engine", "checkpointing", "method"),
    [
        ("zero2", False, "lora"),
        pytest.param("zero3", False, "lora", marks=pytest.mark.heavy),
        ("zero3", True, "lora"),
        ("zero3", False, "peft-lora"),
        pytest.param("fsdp", True, "lora", marks=pytest.mark.heavy),
    ],
)
def test_training_afterwards_is_as_without(
    ranks: GetRanks, model: Path, tmp_path: Path, engine: str, checkpointing: bool, method: str
) -> None:
    losses = []
    for budget in (None, SMALL):
        folder = tmp_path / str(budget)
        folder.mkdir()
        options = task(
            model, folder, 2, engine, gradient_checkpointing=checkpointing, method=method
        )
        ranks(2).run(gradient_work.train, options, budget)
        losses.append(runs.losses(folder / "run"))
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


def test_sixteen_bit_activations_are_multiplied_in_float32(ranks: GetRanks) -> None:
    """Also: weights without any adapter, and a rank that has no row."""
    ours = assemble(ranks(2).run(gradient_work.sixteen_bit))
    x = torch.cat([gradient_work.inputs(0), gradient_work.inputs(1)])
    model = gradient_work.Linears()
    with torch.no_grad():
        hidden = model[0](x).double()
    # The gradient of the outputs is 1, that of the hidden layer the second's only row.
    expected = {
        "0": model[1].get_parameter("weight").double().T @ x.double().sum(0)[None],
        "1": hidden.sum(0)[None],
    }
    for name, gradient in expected.items():
        np.testing.assert_allclose(ours[name], gradient.numpy(), rtol=1e-4)


def test_ranks_on_different_ways_are_refused(ranks: GetRanks) -> None:
    for message in ranks(2).run(gradient_work.other_ways):
        assert "--target_modules" in message
