"""fp32 training is the same on every engine and any number of ranks."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.support import runs, tiny_models
from tests.support.ranks import Ranks

GetRanks = Callable[[int], Ranks]
Rules = list[dict[str, tuple[str, float]]]

STEPS, LAYERS = 20, 14
TOLERANCE = 1e-5  # of a loss, relative
ROUNDING = 1e-5  # a relative change of the grams that two runs may differ by
GLOBAL_BATCH = 12
# Examples of a micro-batch by ranks: accumulation on 1 and 2 ranks, none on 3 and 4.
MICRO_BATCH = {1: 6, 2: 3, 3: 4, 4: 3}
# Larger steps than these amplify rounding.
TASK = {
    "train_batch_size": GLOBAL_BATCH,
    "max_length": 32,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.1,  # so that clipping takes part
    "rank": 4,
    "lora_alpha": 8,
    "scaling_rule": "paper",  # rounding may decide between its two
    "eta_lipschitz": 0.5,
    "scaling_interval": 1,
    "save_model": False,
    "save_steps": 0,
    "update_rank_layers": 0,
}


class Outcome(NamedTuple):
    losses: np.ndarray  # (steps,)
    rules: Rules


def train(ranks: Ranks, model: Path, folder: Path, **others: Any) -> Outcome:
    given = {"model_name_or_path": model, "dataset": model / "texts.jsonl", "output_dir": folder}
    answers = ranks.run(runs.rules_taken, {**given, **TASK, **others})
    assert all(answer == answers[0] for answer in answers[1:])  # bit for bit
    return Outcome(np.array(runs.losses(folder)), answers[0])


@pytest.fixture(scope="session")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``odd_model(architecture)``: the folder of a tiny random model, its texts beside it."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            folder = made[architecture] = tmp_path_factory.mktemp(architecture)
            tiny_models.save_odd_model(folder, architecture)
            # With few letters gradients are alike; A after Adam's first step, the sign of one, then
            # has columns that are exactly parallel, and rounding decides whether H is singular.
            tiny_models.save_texts(folder, string.ascii_letters, longest=32, count=60)
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def reference(
    ranks: GetRanks, odd_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Outcome]:
    """``reference(architecture)``: one process without an engine, the global batch at once."""
    made: dict[str, Outcome] = {}

    def get(architecture: str) -> Outcome:
        if architecture not in made:
            folder = tmp_path_factory.mktemp("reference")
            batch = {"per_device_train_batch_size": GLOBAL_BATCH}
            made[architecture] = train(ranks(1), odd_model(architecture), folder, **batch)
        return made[architecture]

    return get


EVERY_DAY = [("gemma3", 4, "hybrid"), ("llama", 1, "local")]
EVERY_DAY += [
    (architecture, size, engine)
    for architecture, size in (("gemma3", 2), ("llama", 3))
    for engine in ("zero0", "zero1", "zero2", "zero3", "fsdp")
]
# One rank and four (ZeRO-0 and 1 keep weights as ZeRO-2 does), and the other architecture where
# weights are cut up.
HEAVY = [("gemma3", 1, "local"), ("llama", 4, "hybrid")]
HEAVY += [("llama", size, "zero2") for size in (1, 4)]
HEAVY += [("llama", size, x) for size in (1, 2, 4) for x in ("zero3", "fsdp")]
HEAVY += [("gemma3", 3, x) for x in ("zero3", "fsdp")]
# With a constant learning rate, a shorter run is the beginning of a longer one.
CASES = [pytest.param(*case, STEPS) for case in EVERY_DAY]
CASES += [pytest.param(*case, STEPS // 2, marks=pytest.mark.heavy) for case in HEAVY]


@pytest.mark.parametrize(("architecture", "size", "engine", "steps"), CASES)
def test_losses_and_rules_agree_with_one_process(
    ranks: GetRanks,
    odd_model: Callable[[str], Path],
    reference: Callable[[str], Outcome],
    tmp_path: Path,
    architecture: str,
    size: int,
    engine: str,
    steps: int,
) -> None:
    """A rescale in each fp32 step: losses to 1e-5 relative, and the rule that each layer takes.

    A layer may take another rule only where its column solution is within rounding of a bound.
    """
    expected = reference(architecture)
    ours = train(
        ranks(size),
        odd_model(architecture),
        tmp_path / "run",
        max_steps=steps,
        per_device_train_batch_size=MICRO_BATCH[size],
        **runs.engine_options(engine, tmp_path),
    )
    assert len(ours.losses) == steps and len(expected.losses) == STEPS
    largest = float(np.abs(ours.losses / expected.losses[:steps] - 1).max())
    others = check_rules(ours.rules, expected.rules[:steps])
    print(f"{architecture}, {engine}, {size} rank(s): {largest:.1e} {others} other rule(s)")
    assert largest < TOLERANCE


def check_rules(ours: Rules, expected: Rules) -> int:
    """How many layers took another rule at some step, having been free to."""
    others = 0
    for step, (here, there) in enumerate(zip(ours, expected, strict=True)):
        assert len(here) == LAYERS and list(here) == list(there)
        for layer, (rule, distance) in here.items():
            other_rule, other_distance = there[layer]
            # The distance is our own derivation: it must tell what the solver did.
            assert (rule == "column") == (distance > 0) or abs(distance) < ROUNDING
            if rule != other_rule:
                others += 1
                assert max(abs(distance), abs(other_distance)) < ROUNDING, (
                    f"step {step}, {layer}: {rule} at {distance}, {other_rule} at {other_distance}"
                )
    return others
