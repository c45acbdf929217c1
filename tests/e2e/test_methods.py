"""Every method, under ZeRO-3 and FSDP: it learns, goes on as it was, and leaves its model."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalora_dist.checkpoint.manifest import checkpoints, step_of
from scalora_dist.config.method import MethodArguments, MethodName
from scalora_dist.methods.registry import METHODS
from tests.support import runs, tiny_models, tiny_runs
from tests.support.ranks import Ranks, most_ranks
from tests.support.workers.counting import train

GetRanks = Callable[[int], Ranks]
HEAVY = pytest.mark.heavy

STEPS, SAVED = 6, 3
# HiRA's update is W's size at most, LoRA-SB has taken its first step before the first; the others
# move fast enough at 1e-2 for six steps to show.
RATES = {"hira": 0.1, "lora-sb": 1e-3, "lora-alpha": 1e-3, "full": 3e-3}
FALLS = {"lora-sb": 0.15, "hira": 0.15}  # by how much at least, of 6.8; the others:
FALL = 0.4
SETTINGS = {
    # Restarts before the checkpoint and after it.
    "relora": {"relora_interval": 2, "relora_warmup_steps": 1},
    # Of 2 · rank directions, and the narrowest layer has six.
    "lora-ga": {"rank": 3},
}
STARTS = [name for name, method in METHODS.items() if method.initialize]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


def options(
    task: Path, folder: Path, engine: str, method: MethodName, **others: Any
) -> dict[str, Any]:
    """A run of a method; what of the common options it does not read is left out."""
    read = ("rank", "lora_alpha", "lora_dropout")
    unread = {name: None for name in read if not MethodArguments(method=method).reads(name)}
    given: dict[str, Any] = {
        "method": method,
        "learning_rate": RATES.get(method, 1e-2),
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "save_steps": SAVED,
    }
    given |= SETTINGS.get(method, {}) | others | unread
    return tiny_runs.options(task, folder, engine, **given)


@pytest.fixture(scope="module")
def untrained(task: Path) -> float:
    """The loss on what is held out before training."""
    return tiny_runs.loss_on_held_out(options(task, task, "local", "lora"), task)


# The engines that each method is tested on every day. The other one of the two is heavy.
EVERY_DAY = {
    "scalora": ("zero3", "fsdp"),
    "relora": ("zero3", "fsdp"),
    "full": ("zero3",),
    "lora": ("fsdp",),
    "lora-pro": ("fsdp",),
    "lora-xs": ("fsdp",),
    "lora-sb": ("zero3",),
    "mora": ("fsdp",),
    "dora": ("zero3",),
    "hira": ("fsdp",),
    "pissa": ("zero3",),
    "lora-ga": ("fsdp",),
    # They differ from others in s, in a learning rate, or in whose layers they are.
    "rslora": (),
    "lora-alpha": (),
    "lora-plus": (),
    "peft-lora": (),
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("method", "engine"),
    [
        pytest.param(method, engine, marks=[] if engine in EVERY_DAY[method] else HEAVY)
        for method, engine in itertools.product(METHODS, ("zero3", "fsdp"))
        if method not in tiny_runs.LIKE_OTHERS or engine == "zero3"
    ],
)
def test_a_method_learns_goes_on_and_leaves_its_model(
    ranks: GetRanks, task: Path, untrained: float, tmp_path: Path, method: MethodName, engine: str
) -> None:
    folder, group = tmp_path / "run", ranks(most_ranks(2))
    case = options(task, folder, engine, method, save_model=True)
    ran = [(0, int(method in STARTS))] * group.size
    assert group.run(train, case) == ran
    check_learned(case, method)
    first, *_, last = tiny_runs.evaluations(folder)
    assert tiny_runs.loss_on_held_out(case, folder / "model") == pytest.approx(last, rel=1e-5)
    # What a start adds it takes from W, or it is small; but LoRA-SB's is a step.
    if method == "lora-sb":
        assert first < untrained - 0.1
    else:
        assert first == pytest.approx(untrained, rel=1e-5)

    expected = tiny_runs.left(folder)
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    shutil.rmtree(folder / "model")
    again = group.run(train, case | {"resume_from_checkpoint": "latest"})
    assert again == [(SAVED, 0)] * group.size
    assert tiny_runs.left(folder) == expected


def check_learned(case: dict[str, Any], method: str) -> None:
    """The last losses are below the first, on the batches and on what was held out."""
    losses, held_out = runs.losses(case["output_dir"]), tiny_runs.evaluations(case["output_dir"])
    print(method, [round(loss, 3) for loss in losses], [round(loss, 3) for loss in held_out])
    assert np.isfinite(losses).all() and len(losses) == case["max_steps"]
    records = [line for line in tiny_runs.lines(case["output_dir"]) if "loss" in line]
    assert not any("skipped_step" in record for record in records)
    restarts = [record["step"] for record in records if "restart" in record]
    interval = SETTINGS["relora"]["relora_interval"]
    every = list(range(interval, case["max_steps"] + 1, interval))
    assert restarts == (every if method == "relora" else [])
    if method == "lora-sb":
        # Its first step lies before these losses, and its last are batches of other texts.
        assert held_out[-1] < held_out[0] - FALLS[method] / 2
        return
    fall = FALLS.get(method, FALL)
    assert np.mean(losses[-2:]) < losses[0] - fall
    assert held_out[-1] < held_out[0] - fall


@pytest.mark.parametrize(
    "method",
    ["relora", *(pytest.param(n, marks=HEAVY) for n in ("full", "lora-xs", "dora", "lora-sb"))],
)
def test_a_method_goes_on_in_one_process(
    ranks: GetRanks, task: Path, tmp_path: Path, method: MethodName
) -> None:
    """From ZeRO-3 on two ranks; without dropout, which other ranks draw otherwise."""
    without = {"lora_dropout": 0.0}
    case = options(task, tmp_path / "a", "zero3", method, **without)
    ranks(2).run(train, case)
    checkpoint = tmp_path / "a" / f"checkpoint-{SAVED}"
    there = options(task, tmp_path / "b", "local", method, **without)
    there["resume_from_checkpoint"] = checkpoint
    assert ranks(1).run(train, there) == [(SAVED, 0)]
    ours, theirs = (np.array(runs.losses(tmp_path / run)) for run in "ba")
    assert (ours[:SAVED] == theirs[:SAVED]).all()
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert tiny_runs.evaluations(tmp_path / "b") == pytest.approx(
        tiny_runs.evaluations(tmp_path / "a"), rel=1e-5
    )


DISTINCT = [name for name in METHODS if name not in tiny_runs.LIKE_OTHERS]
RARE = {"zero3_offload": 2, "fsdp_offload": 2, "hybrid": 4}  # on so many ranks


def steady(method: MethodName) -> dict[str, Any]:
    """Options with which other ranks train alike: without dropout, which they draw otherwise.

    At 1e-2, two columns of a layer tie at ScaLoRA's second rescale: rounding decides which of them
    is scaled by 16, and which by 1.
    """
    return {"lora_dropout": 0.0, "save_steps": 0, "learning_rate": RATES.get(method, 1e-3)}


@pytest.fixture(scope="module")
def in_one_process(
    ranks: GetRanks, task: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[MethodName], list[float]]:
    """``in_one_process(method)``: its losses without an engine and without dropout."""
    made: dict[MethodName, list[float]] = {}

    def get(method: MethodName) -> list[float]:
        if method not in made:
            folder = tmp_path_factory.mktemp(method) / "run"
            ranks(1).run(train, options(task, folder, "local", method, **steady(method)))
            made[method] = runs.losses(folder)
        return made[method]

    return get


@HEAVY
@pytest.mark.parametrize(
    ("method", "engine"),
    [*itertools.product(DISTINCT[:1], RARE), *zip(DISTINCT[1:], itertools.cycle(RARE))],
)
def test_a_method_trains_alike_where_few_train(
    ranks: GetRanks,
    task: Path,
    tmp_path: Path,
    in_one_process: Callable[[MethodName], list[float]],
    method: MethodName,
    engine: str,
) -> None:
    """Offloaded to the CPU, or on a hybrid mesh; ScaLoRA on all of them."""
    case = options(task, tmp_path / "run", engine, method, **steady(method))
    ranks(RARE[engine]).run(train, case)
    # LoRA-Pro divides by what A's first steps have left of its columns.
    tolerance = 1e-3 if method == "lora-pro" else 1e-4
    assert runs.losses(tmp_path / "run") == pytest.approx(in_one_process(method), rel=tolerance)


@HEAVY
@pytest.mark.parametrize(
    ("method", "engine", "size"),
    [
        (method, *where)
        for method, where in zip(DISTINCT, itertools.cycle([("zero2", 2), ("hybrid", 4)]))
    ],
)
def test_copies_stay_the_same_bit_for_bit(
    ranks: GetRanks, task: Path, tmp_path: Path, method: MethodName, engine: str, size: int
) -> None:
    """Where ranks hold copies, every save compares them: none is refused."""
    others = {"save_steps": 1, "bf16": True}
    ranks(size).run(train, options(task, tmp_path / "run", engine, method, **others))
    assert step_of(checkpoints(tmp_path / "run")[0]) == STEPS


@HEAVY
@pytest.mark.parametrize(("method", "engine"), zip(DISTINCT, itertools.cycle(["zero3", "zero2"])))
def test_a_method_learns_in_fp16(
    ranks: GetRanks, task: Path, tmp_path: Path, method: MethodName, engine: str
) -> None:
    # A loss scale that overflows on no first step.
    fp16 = tiny_runs.fp16_options(engine, tmp_path, initial_scale_power=5)
    case = options(task, tmp_path / "run", engine, method, save_steps=0, **fp16)
    ranks(2).run(tiny_runs.train_fp16, case)
    check_learned(case, method)


# Each on one engine; in one process where fp32 masters meet a bfloat16 model. What differs from
# others in s or a learning rate alone is tried now and then.
ALIKE_IN_BF16 = (*tiny_runs.LIKE_OTHERS, "lora-ga", "pissa")
BF16 = {
    "scalora": ["zero3", "local"],
    "lora": ["fsdp"],
    "rslora": ["zero3"],
    "lora-alpha": ["fsdp"],
    "lora-plus": ["zero3"],
    "lora-pro": ["fsdp"],
    "relora": ["zero3", "local"],
    "lora-xs": ["fsdp", "local"],
    "lora-sb": ["zero3"],
    "mora": ["fsdp", "local"],
    "full": ["zero3", "local"],
    "peft-lora": ["fsdp"],
    "dora": ["zero3", "local"],
    "hira": ["fsdp"],
    "pissa": ["zero3"],
    "lora-ga": ["fsdp"],
}


@pytest.mark.parametrize(
    ("method", "engine"),
    [
        pytest.param(method, engine, marks=HEAVY if method in ALIKE_IN_BF16 else [])
        for method in METHODS
        for engine in BF16.get(method, ["fsdp"])
    ],
)
def test_a_method_learns_in_bf16(
    ranks: GetRanks, task: Path, tmp_path: Path, method: MethodName, engine: str
) -> None:
    """Three steps; then the model is loaded, and is what was evaluated last, to bf16's digits."""
    case = options(task, tmp_path / "run", engine, method, max_steps=3, save_steps=0)
    case |= {"bf16": True, "save_model": True, "per_device_train_batch_size": 6}
    ranks(1 if engine == "local" else 2).run(train, case)
    losses, held_out = runs.losses(tmp_path / "run"), tiny_runs.evaluations(tmp_path / "run")
    print(method, [round(loss, 3) for loss in losses], [round(loss, 3) for loss in held_out])
    assert np.isfinite(losses).all() and len(losses) == 3
    assert held_out[-1] < held_out[0] - 0.02
    exported = tiny_runs.loss_on_held_out(case, tmp_path / "run" / "model")
    assert exported == pytest.approx(held_out[-1], rel=1e-2)
