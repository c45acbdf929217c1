"""What to look at first on a GPU: each test is one line of `tools/bench_gpu.py`.

On a machine without a GPU the ranks run on the CPU, so that the tests themselves are tested.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from scalora_dist.config.method import MergeRounding
from tests.support import runs, tiny_models, tiny_runs, toy
from tests.support.ranks import Ranks, most_ranks, on_gpus
from tests.support.workers import check_plan, compiled, offloading
from tests.support.workers import first_on_gpu as work

pytestmark = [pytest.mark.gpu, pytest.mark.heavy]
GetRanks = Callable[[int], Ranks]
STEADY: dict[str, Any] = {"lora_dropout": 0.0, "max_steps": 4, "save_steps": 0, "eval_size": None}
ON_GPU = on_gpus()
# Of losses. A GPU's products differ with the alignment of what engines gather.
CLOSE = 1e-4 if ON_GPU else 1e-5


def each(*values: Any) -> tuple[Any, ...]:
    """All values on a GPU. On a CPU the first: other tests try the rest there."""
    return values if ON_GPU else values[:1]


def ds_config(engine: str, folder: Path, **settings: Any) -> Path:
    """Write a config of ds_configs/ with other settings of ZeRO."""
    config = json.loads(Path(runs.ds_config(engine)).read_text())
    config["zero_optimization"] |= settings
    (folder / "ds.json").write_text(json.dumps(config))
    return folder / "ds.json"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def alone(ranks: GetRanks, task: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process, in float32."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    ranks(1).run(runs.run, tiny_runs.options(task, folder, "local", **STEADY))
    return runs.losses(folder)


def test_ranks_are_on_the_device(ranks: GetRanks) -> None:
    assert ranks(1).run(work.device_of) == ["cuda" if ON_GPU else "cpu"]


@pytest.mark.parametrize("size", [1, 2])
def test_collectives(ranks: GetRanks, size: int) -> None:
    for rank, found in enumerate(ranks(size).run(work.collectives)):
        assert found["backend"] == ("nccl" if ON_GPU else "gloo")
        assert found["sum"] == [size, sum(range(size))] and found["max"] == [size - 1]
        assert found["agree"] == [True, size == 1], rank
        assert found["rows"] == [[other, 7] for other in range(size)]
        assert found["first"] == 5.0


def test_grams(ranks: GetRanks) -> None:
    assert ranks(1).run(work.grams)[0] < 1e-12


MERGES = [
    (torch.bfloat16, "split", 1e-6, 1e-3),
    # A bfloat16 has 8 bits, so that much of W is rounded away.
    (torch.bfloat16, "nearest", 2.0**-8, 1.0),
    (torch.float32, "nearest", 1e-6, 1e-3),
]


@pytest.mark.parametrize(("dtype", "rounding", "of_weight", "of_increment"), MERGES)
def test_merge(
    ranks: GetRanks,
    dtype: torch.dtype,
    rounding: MergeRounding,
    of_weight: float,
    of_increment: float,
) -> None:
    weight, increment = ranks(1).run(work.merge, dtype, rounding)[0]
    assert weight < of_weight and increment < of_increment


def test_the_merge_kernel_has_pytorchs_bits(ranks: GetRanks) -> None:
    assert ranks(1).run(work.merge_kernel) == [0]


def test_scale(ranks: GetRanks) -> None:
    assert ranks(1).run(work.scale)[0] < 1e-6


@pytest.mark.parametrize("engine", each("zero3", "zero0", "zero1", "zero2", "fsdp"))
@pytest.mark.parametrize("size", [1, 2])
def test_losses_are_one_processs(
    ranks: GetRanks, task: Path, alone: list[float], tmp_path: Path, engine: str, size: int
) -> None:
    """On two ranks over NCCL too, where there are two GPUs."""
    ranks(size).run(runs.run, tiny_runs.options(task, tmp_path / "run", engine, **STEADY))
    assert runs.losses(tmp_path / "run") == pytest.approx(alone, rel=CLOSE)


@pytest.mark.parametrize("engine", each("zero2", "zero3"))
@pytest.mark.parametrize("overlap", each(False, True))
def test_overlap_comm(
    ranks: GetRanks, task: Path, alone: list[float], tmp_path: Path, engine: str, overlap: bool
) -> None:
    config = ds_config(engine, tmp_path, overlap_comm=overlap)
    case = tiny_runs.options(task, tmp_path / "run", "local", **STEADY)
    ranks(most_ranks(2)).run(runs.run, case | {"ds_config": config})
    assert runs.losses(tmp_path / "run") == pytest.approx(alone, rel=CLOSE)


@pytest.mark.parametrize("engine", each("fsdp_offload", "zero3_offload"))
def test_offload_with_pinned_shards(
    ranks: GetRanks, task: Path, alone: list[float], tmp_path: Path, engine: str
) -> None:
    case = tiny_runs.options(task, tmp_path / "run", engine, **STEADY)
    if "ds_config" in case:  # DeepSpeed keeps smaller weights than this on the GPU
        case["ds_config"] = ds_config(engine, tmp_path, stage3_param_persistence_threshold=0)
    pinned = ranks(most_ranks(2)).run(work.pinned_weights, case)
    assert runs.losses(tmp_path / "run") == pytest.approx(alone, rel=CLOSE)
    assert all(all(rank) for rank in pinned) or not ON_GPU


@pytest.mark.parametrize("engine", each("fsdp", "local", "zero2", "zero3"))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_on_the_host(
    ranks: GetRanks,
    task: Path,
    alone: list[float],
    tmp_path: Path,
    engine: str,
    checkpointing: bool,
) -> None:
    """All of them, however small, by copies on a stream of their own."""
    case = tiny_runs.options(task, tmp_path / "run", engine, **STEADY)
    case |= {"activation_offloading": True, "gradient_checkpointing": checkpointing}
    found = ranks(1 if engine == "local" else most_ranks(2)).run(offloading.train, case)
    assert runs.losses(tmp_path / "run") == pytest.approx(alone, rel=CLOSE)
    assert all(sent > 0 and of_parameters == 0 for sent, of_parameters in found)


def test_activations_of_compiled_blocks_on_the_host(
    ranks: GetRanks, task: Path, alone: list[float], tmp_path: Path
) -> None:
    if not ON_GPU and shutil.which("g++") is None:
        pytest.skip("inductor needs g++ on a CPU")
    case = tiny_runs.options(task, tmp_path / "run", "local", **STEADY)
    case |= {"activation_offloading": True, "torch_compile": True}
    ((graphs, sent, of_parameters),) = ranks(1).run(compiled.train_offloading, case, timeout=500)
    assert runs.losses(tmp_path / "run") == pytest.approx(alone, rel=CLOSE)
    assert graphs > 0 and sent > 0 and of_parameters == 0


@pytest.mark.parametrize("engine", each("local", "zero3", "fsdp"))
def test_sums_of_a_start_on_the_host(
    ranks: GetRanks, task: Path, tmp_path: Path, engine: str
) -> None:
    """They are those on the device, and the room for them is less than what is free."""
    case = tiny_runs.options(task, tmp_path / "run", engine, **STEADY, method="lora-ga", rank=2)
    group = ranks(1 if engine == "local" else most_ranks(2))
    for error, room, free in group.run(work.sums_of_a_start, case):
        assert error < CLOSE
        assert room.host > 0
        assert 0 < room.device < free if ON_GPU else room.device == 0


def test_checkpoint_staging(ranks: GetRanks) -> None:
    assert ranks(1).run(work.staging) == [(ON_GPU, True)]


@pytest.mark.parametrize("engine", each("local", "zero3", "fsdp"))
def test_a_resume_goes_on(ranks: GetRanks, task: Path, tmp_path: Path, engine: str) -> None:
    case = tiny_runs.options(task, tmp_path / "run", engine, **STEADY | {"save_steps": 2})
    group = ranks(1 if engine == "local" else most_ranks(2))
    group.run(runs.run, case)
    expected = runs.losses(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    there = case | {"output_dir": tmp_path / "there", "resume_from_checkpoint": checkpoint}
    assert all(first == 2 for first, *_ in group.run(tiny_runs.train, there))
    assert runs.losses(tmp_path / "there") == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_bit_products(ranks: GetRanks, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    found = ranks(1).run(work.fourbit, dtype)[0]
    rounding = 1e-5 if dtype == torch.float32 else 2.0**-7
    assert found["output"] < rounding and found["gradient"] < rounding
    assert found["numbers"] < 1e-6


def test_ligers_loss_is_ours(ranks: GetRanks) -> None:
    if not (ON_GPU and find_spec("liger_kernel")):
        pytest.skip("needs a GPU and liger-kernel")
    found = ranks(1).run(work.liger)[0]
    assert found["loss"] < 2e-3 and found["gradient"] < 2e-2


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_attention(ranks: GetRanks, tmp_path: Path, implementation: str) -> None:
    if implementation != "sdpa" and not (ON_GPU and is_flash_attn_2_available()):
        pytest.skip("needs a GPU and flash-attn")
    sizes = {"hidden_size": 128, "intermediate_size": 96, "head_dim": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tiny_models.save_odd_model(tmp_path, "llama", **sizes, **heads)
    assert ranks(1).run(work.attention, tmp_path, implementation)[0] < 0.05


@pytest.mark.parametrize("engine", each("zero2", "zero3"))
def test_fp16_skips_and_goes_on(ranks: GetRanks, task: Path, tmp_path: Path, engine: str) -> None:
    """The first loss scales are far too large for float16."""
    fp16 = tiny_runs.fp16_options(engine, tmp_path, initial_scale_power=26, hysteresis=1)
    case = tiny_runs.options(task, tmp_path / "run", engine, **STEADY | {"max_steps": 24} | fp16)
    ranks(most_ranks(2)).run(tiny_runs.train_fp16, case)
    lines = [line for line in runs.metrics(tmp_path / "run") if "loss" in line]
    skipped = [line.get("skipped_step", False) for line in lines]
    count = sum(skipped)
    assert skipped[0] and not any(skipped[-4:])
    assert lines[-1]["loss_scale"] == 2.0 ** (26 - count)
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("engine", each("zero2", "zero3"))
def test_a_step_that_is_not_finite_changes_nothing(ranks: GetRanks, engine: str) -> None:
    (seen, *_) = ranks(most_ranks(2)).run(toy.skipped_step, engine=engine, dtype="bf16")
    assert [seen[f"step{i}_applied"] for i in range(3)] == [True, False, True]
    for name in toy.SHAPES:
        before, after = seen["step1_state"][name], seen["step1_after"][name]
        assert before.largest_error(after, toy.KEPT) == 0


def test_memory_snapshot(ranks: GetRanks, task: Path, tmp_path: Path) -> None:
    case = tiny_runs.options(task, tmp_path / "run", "local", **STEADY)
    ranks(1).run(runs.run, case | {"profile": True})
    left = {file.name for file in (tmp_path / "run" / "profile").iterdir()}
    assert "profile.json" in left
    assert ("memory-rank0.pickle" in left) == ON_GPU


@pytest.mark.parametrize("engine", each("local", "zero2", "zero3", "fsdp"))
def test_plan_against_the_allocator(ranks: GetRanks, tmp_path: Path, engine: str) -> None:
    """Within a tenth. On a CPU the bytes of live tensors are compared, of a smaller model."""
    wide = 16 if ON_GPU else 2  # the allocator counts in blocks of 512 bytes: use large tensors
    heads = {"num_attention_heads": wide, "num_key_value_heads": wide, "head_dim": 32}
    sizes = {"hidden_size": 32 * wide, "intermediate_size": 96 * wide, "num_hidden_layers": 4}
    tiny_models.save_task(tmp_path, **sizes, **heads, vocab_size=1000 * wide)
    options = {"max_length": 160, "per_device_train_batch_size": 4, "train_batch_size": None}
    case = tiny_runs.options(
        tmp_path, tmp_path / "run", engine, bf16=True, lora_dropout=0.0, **options
    )
    group = ranks(1 if engine == "local" else most_ranks(2))
    found = group.run(check_plan.measured, case)
    plan = check_plan.planned(case, group.size).peak.total
    measured = max((rank.peak or 0) if ON_GPU else rank.tracked for rank in found)
    assert measured == pytest.approx(plan, rel=0.1)
