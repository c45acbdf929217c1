"""Runs on 4-bit bases: they learn, go on as they were, and a merge leaves what layers compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
)

from scalora_dist.config.method import MethodName
from scalora_dist.methods.registry import METHODS
from tests.support import runs, tiny_models, tiny_runs
from tests.support.ranks import Ranks, most_ranks
from tests.support.workers import fourbit as work

pytest.importorskip("bitsandbytes")
GetRanks = Callable[[int], Ranks]
HEAVY = pytest.mark.heavy

ON_FOUR_BITS = [name for name, method in METHODS.items() if not method.needs_dense]
DAILY = {
    "scalora": ("zero3", "fsdp"),
    "relora": ("zero3",),
    "lora": ("fsdp",),
    "lora-xs": ("zero3",),
    "lora-sb": ("fsdp",),
}


def engines_of(method: MethodName) -> tuple[str, ...]:
    if method in tiny_runs.LIKE_OTHERS:
        return ("zero3",)
    whole = ("local", "zero2") if method in ("scalora", "lora-sb") else ()  # no shards of weights
    return (*whole, "zero3", "fsdp")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


@pytest.mark.floors
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("method", "engine"),
    [
        pytest.param(name, engine, marks=[] if engine in DAILY.get(name, ()) else HEAVY)
        for name in ON_FOUR_BITS
        for engine in engines_of(name)
    ],
)
def test_a_method_learns_goes_on_and_leaves_its_model(
    ranks: GetRanks, task: Path, tmp_path: Path, method: MethodName, engine: str
) -> None:
    """The model it leaves is dense, and computes what was evaluated last."""
    folder, group = tmp_path / "run", ranks(1 if engine == "local" else most_ranks(2))
    case = work.options(task, folder, engine, method, save_model=True)
    group.run(tiny_runs.train, case)
    losses, held_out = runs.losses(folder), tiny_runs.evaluations(folder)
    print(method, [round(loss, 3) for loss in losses], [round(loss, 3) for loss in held_out])
    assert np.isfinite(losses).all()
    assert held_out[-1] < held_out[0] - (0.05 if method == "lora-sb" else 0.3)
    assert "quantization_config" not in json.loads((folder / "model/config.json").read_text())
    exported = tiny_runs.loss_on_held_out(case, folder / "model")
    assert exported == pytest.approx(held_out[-1], rel=1e-5)

    expected = tiny_runs.left(folder)
    shutil.rmtree(folder / f"checkpoint-{work.STEPS}")
    shutil.rmtree(folder / "model")
    answers = group.run(tiny_runs.train, case | {"resume_from_checkpoint": "latest"})
    assert all(first == work.SAVED for first, *_ in answers)
    assert tiny_runs.left(folder) == expected


def with_small_steps(task: Path, folder: Path, engine: str, **others: Any) -> dict[str, Any]:
    """Larger steps amplify rounding: where a gradient is only rounding, AdamW moves by lr too."""
    return work.options(task, folder, engine, learning_rate=1e-3, **others)


@pytest.fixture(scope="module")
def in_one_process(
    ranks: GetRanks, task: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[bool, Path]:
    """{bf16: a run on one process}"""
    folders = {}
    for bf16 in (False, True):
        folders[bf16] = tmp_path_factory.mktemp("alone") / "run"
        ranks(1).run(tiny_runs.train, with_small_steps(task, folders[bf16], "local", bf16=bf16))
    return folders


@pytest.mark.parametrize(
    ("engine", "size"),
    [
        ("zero3", 2),
        ("fsdp", 2),
        pytest.param("zero2", 2, marks=HEAVY),
        pytest.param("zero3", 3, marks=HEAVY),
        pytest.param("fsdp", 3, marks=HEAVY),
        pytest.param("zero3_offload", 2, marks=HEAVY),
        pytest.param("fsdp_offload", 2, marks=HEAVY),
        pytest.param("hybrid", 4, marks=HEAVY),
    ],
)
def test_engines_agree(
    ranks: GetRanks,
    task: Path,
    in_one_process: dict[bool, Path],
    tmp_path: Path,
    engine: str,
    size: int,
) -> None:
    """And so the checkpoint of one goes on in another."""
    case = with_small_steps(task, tmp_path / "run", engine, per_device_train_batch_size=1)
    ranks(size).run(tiny_runs.train, case)
    alone = runs.losses(in_one_process[False])
    assert runs.losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)
    kept = [line["carry"]["rank_max"] for line in runs.metrics(tmp_path / "run") if "carry" in line]
    assert len(kept) >= 3 and set(kept) == {work.CARRY["carry_rank"]}

    checkpoint = tmp_path / "run" / f"checkpoint-{work.SAVED}"
    there = with_small_steps(task, tmp_path / "there", "local", resume_from_checkpoint=checkpoint)
    assert ranks(1).run(tiny_runs.train, there)[0][0] == work.SAVED
    assert runs.losses(tmp_path / "there") == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    "engine", ["fsdp", *(pytest.param(x, marks=HEAVY) for x in ("zero2", "zero3"))]
)
def test_in_bf16(
    ranks: GetRanks, task: Path, in_one_process: dict[bool, Path], tmp_path: Path, engine: str
) -> None:
    case = with_small_steps(
        task, tmp_path / "run", engine, bf16=True, per_device_train_batch_size=1
    )
    ranks(2).run(tiny_runs.train, case)
    alone = runs.losses(in_one_process[True])
    assert runs.losses(tmp_path / "run") == pytest.approx(alone, rel=2e-2)


@HEAVY
def test_where_fsdp_computes_in_another_dtype(
    ranks: GetRanks, task: Path, in_one_process: dict[bool, Path], tmp_path: Path
) -> None:
    config = runs.REPOSITORY / "launch/fsdp/mixed.yaml"
    others: dict[str, Any] = {"fsdp_config": config, "gradient_checkpointing": True}
    case = with_small_steps(task, tmp_path / "run", "fsdp", per_device_train_batch_size=1, **others)
    ranks(2).run(tiny_runs.train, case)
    alone = runs.losses(in_one_process[False])
    assert runs.losses(tmp_path / "run") == pytest.approx(alone, rel=2e-2)


@HEAVY
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_in_fp16(
    ranks: GetRanks, task: Path, in_one_process: dict[bool, Path], tmp_path: Path, engine: str
) -> None:
    fp16 = tiny_runs.fp16_options(engine, tmp_path, initial_scale_power=5)
    case = with_small_steps(task, tmp_path / "run", engine, per_device_train_batch_size=1, **fp16)
    ranks(2).run(tiny_runs.train_fp16, case)
    alone = runs.losses(in_one_process[False])
    assert runs.losses(tmp_path / "run") == pytest.approx(alone, rel=2e-2)


@pytest.mark.parametrize("engine", ["local", "zero3", pytest.param("fsdp", marks=HEAVY)])
def test_a_rescale_leaves_what_layers_compute(
    ranks: GetRanks, task: Path, tmp_path: Path, engine: str
) -> None:
    """After an append to fp32's digits, after a compression by no more than the carry says."""
    case = work.options(task, tmp_path / "run", engine, save_steps=0)
    seen = ranks(1 if engine == "local" else 2).run(work.changes, case)[0]
    assert len(seen) == work.STEPS
    appended = compressed = 0
    for step in seen:
        for change in step.values():
            if change["allowed"] == 0.0:
                appended += 1
                assert change["weight"] <= 1e-6 and change["output"] <= 1e-5
            else:
                compressed += 1
                assert change["weight"] <= change["allowed"] + 1e-6
    assert appended and compressed


def test_a_carry_with_room_is_a_merge_into_w(ranks: GetRanks, task: Path, tmp_path: Path) -> None:
    """50 rescales under ZeRO-3 on a dense base: the carry has as many columns as W has rows."""
    folders = {}
    for target, others in (("weight", {}), ("carry", {"carry_rank": 40, "carry_room": 8})):
        folders[target] = tmp_path / target
        given: dict[str, Any] = {"load_in_4bit": False, "carry_rank": None, "carry_room": None}
        given |= others
        given |= {"merge_target": target, "max_steps": 50, "learning_rate": 1e-3, "save_steps": 0}
        given |= {"per_device_train_batch_size": 6, "eval_size": 0}
        ranks(2).run(tiny_runs.train, work.options(task, folders[target], "zero3", **given))
    by_weight, by_carry = (runs.losses(folders[target]) for target in ("weight", "carry"))
    assert by_carry == pytest.approx(by_weight, rel=1e-5)
    assert by_carry[-1] < by_carry[0] - 1
    reports = [line["carry"] for line in runs.metrics(folders["carry"]) if "carry" in line]
    assert len(reports) >= 5 and reports[-1]["lost_max"] < 1e-5


@pytest.mark.parametrize(("engine", "size"), tiny_runs.CUT_UP)
def test_bytes_of_a_rank(ranks: GetRanks, tmp_path: Path, engine: str, size: int) -> None:
    task = work.save_even_model(tmp_path / "task")
    case = work.options(task, tmp_path / "run", engine, bf16=True, per_device_train_batch_size=1)
    for rank, found in enumerate(ranks(size).run(work.held, case)):
        quantized, other = found["quantized"], found["other"]
        print(engine, size, rank, found)
        assert quantized == 2 * (4 * 128 * 128 + 3 * 128 * 256)
        assert found["codes"] <= 0.5 / size * quantized + 14  # of one layer at most a byte more
        assert found["sizes"] <= 0.02 * quantized  # replicated
        # Whole rows of FSDP2 on an odd number of rows.
        assert found["dense"] <= 2 / size * other + 2 * 128 * 3
        columns = sum(work.CARRY.values())
        sides = 2 * (4 * 256 + 3 * 384)
        assert found["carry"] == pytest.approx(4 / size * columns * sides, rel=0.05)


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_one_rank_reads_the_model(ranks: GetRanks, task: Path, tmp_path: Path, engine: str) -> None:
    """The others have the numbers of no parameter before they are cut up."""
    first, second = ranks(2).run(work.on_meta, work.options(task, tmp_path / "run", engine))
    assert first == []
    assert "model.embed_tokens.weight" in second
    assert "model.layers.1.mlp.down_proj.weight" in second


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_a_model_with_biases_in_bf16(ranks: GetRanks, tmp_path: Path, engine: str) -> None:
    """Whose files and config, read by different ranks, must tell of the same dtypes."""
    task = work.save_even_model(tmp_path / "task", attention_bias=True)
    few: dict[str, Any] = {"max_steps": 2, "save_steps": 0, "bf16": True}
    few["bnb_4bit_quant_storage"] = "bfloat16"
    ranks(2).run(tiny_runs.train, work.options(task, tmp_path / "run", engine, **few))
    ranks(1).run(tiny_runs.train, work.options(task, tmp_path / "alone", "local", **few))
    alone = runs.losses(tmp_path / "alone")
    assert runs.losses(tmp_path / "run") == pytest.approx(alone, rel=1e-2)


def test_nothing_of_bitsandbytes_stays(ranks: GetRanks, task: Path, tmp_path: Path) -> None:
    """Its layers keep the sizes in fp32, four times as many bytes as ours."""
    (left,) = ranks(1).run(work.attributes, work.options(task, tmp_path / "run", "local"))
    assert left == {"fourbit", "scaling", "dropout", "used"}


def test_storage_changes_nothing(ranks: GetRanks, task: Path, tmp_path: Path) -> None:
    """A run goes on with another, and with rows of any length."""
    case = work.options(task, tmp_path / "a", "local")
    ranks(1).run(tiny_runs.train, case)
    there = {"output_dir": tmp_path / "b", "bnb_4bit_quant_storage": "float32"}
    there["resume_from_checkpoint"] = tmp_path / "a" / f"checkpoint-{work.SAVED}"
    ranks(1).run(tiny_runs.train, case | there)
    assert runs.losses(tmp_path / "b") == runs.losses(tmp_path / "a")


@pytest.mark.floors
@pytest.mark.parametrize(
    ("engine", "double_quant"),
    [
        ("local", False),
        ("zero3", True),
        *(pytest.param(*case, marks=HEAVY) for case in (("local", True), ("zero3", False))),
        *(pytest.param("fsdp", nested, marks=HEAVY) for nested in (True, False)),
    ],
)
def test_a_base_that_is_quantized_already(
    ranks: GetRanks, tmp_path: Path, engine: str, double_quant: bool
) -> None:
    """As --load_in_4bit quantizes it, whether its files or our loading did."""
    task = work.save_even_model(tmp_path / "task")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(task, quantization_config=config, dtype="float32")
    shutil.copytree(task, tmp_path / "quantized")
    (tmp_path / "quantized/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "quantized")
    group = ranks(1 if engine == "local" else 2)
    few: dict[str, Any] = {"max_steps": 2, "save_steps": 0, "dataset": task / "texts.jsonl"}
    for name, base, others in (
        ("here", task, {"bnb_4bit_use_double_quant": double_quant}),
        ("there", tmp_path / "quantized", {"load_in_4bit": False}),
    ):
        case = work.options(base, tmp_path / name, engine, **(few | others))
        group.run(tiny_runs.train, case)
    here, there = (runs.losses(tmp_path / name) for name in ("here", "there"))
    assert there == pytest.approx(here, rel=1e-5)


def test_a_checkpoint_holds_no_base(ranks: GetRanks, task: Path, tmp_path: Path) -> None:
    """Adapters, carry, optimizer; a run that merges into W saves all adapted weights instead."""
    ranks(1).run(tiny_runs.train, work.options(task, tmp_path / "run", "local", max_steps=4))
    from safetensors import safe_open

    (file,) = (tmp_path / "run/checkpoint-4").glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        kinds = {name.split(".")[-1] for name in tensors.keys() if "random" not in name}  # noqa: SIM118
    assert kinds == {"A", "B", "C", "D", "m", "v"}


def test_a_warning_when_much_is_lost(ranks: GetRanks, task: Path, tmp_path: Path) -> None:
    tight: dict[str, Any] = {"carry_rank": 4, "carry_limit": 0.01, "save_steps": 0}
    ((_, summary, heard),) = ranks(1).run(
        tiny_runs.train, work.options(task, tmp_path / "a", "local", **tight)
    )
    (warning,) = [text for text in heard if "carry" in text]
    assert "--carry_rank above 4" in warning and summary["carry"]["lost_max"] > 0.01
    wide = tight | {"carry_limit": 1e3}
    ((_, _, heard),) = ranks(1).run(
        tiny_runs.train, work.options(task, tmp_path / "b", "local", **wide)
    )
    assert not [text for text in heard if "carry" in text]
    (report, *_) = [line["carry"] for line in runs.metrics(tmp_path / "b") if "carry" in line]
    assert report["compressed"] == len(report["lost"]) == 14
    assert report["lost_max"] == max(report["lost"].values()) > 0
