"""Plans against what real ranks hold, send and need."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config, MptConfig

from scalora_dist.config.parser import parse_options
from scalora_dist.errors import UserError
from scalora_dist.planning.arguments import SHIPPED, PlanArguments, config_folder
from scalora_dist.planning.least_times import least_times_of
from scalora_dist.planning.measured import PHASES
from scalora_dist.planning.plan import Plan
from scalora_dist.planning.planner import Planner
from scalora_dist.planning.report import report
from scalora_dist.profiling.gpus import GPUS, find_gpu
from tests.support import launched, runs, tiny_models, tiny_runs
from tests.support.workers.check_plan import measured, planned

ROOT = Path(__file__).parents[2]
# Large enough for tensors that are no parameters or activations (labels, counts) not to matter.
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 24,
    "vocab_size": 3001,
}
FULL: dict[str, Any] = {"method": "full", "rank": None, "lora_alpha": None}
CARRY = {"merge_target": "carry", "carry_rank": 4, "carry_room": 4}  # full in the measured step
FOURBIT = CARRY | {"load_in_4bit": True, "bf16": True}
SETUPS: dict[str, tuple[int, dict[str, Any]]] = {
    "local": (1, {}),
    "local, bf16, checkpointing": (1, {"bf16": True, "gradient_checkpointing": True}),
    "local, 4 bits": (1, FOURBIT),
    "zero1": (2, {}),
    "zero2, checkpointing": (2, {"gradient_checkpointing": True}),
    "zero2, bf16": (2, {"bf16": True}),
    "zero2, 4 bits": (2, FOURBIT),
    "zero3": (2, {}),
    "zero3, bf16, checkpointing": (2, {"bf16": True, "gradient_checkpointing": True}),
    "zero3, checkpointing, 3 ranks": (3, {"gradient_checkpointing": True}),
    "fsdp": (2, {}),
    "fsdp, bf16, checkpointing": (2, {"bf16": True, "gradient_checkpointing": True}),
    "fsdp, 4 bits": (2, FOURBIT),
    "zero3, carry": (2, CARRY),
    "fsdp, lora, 4 ranks": (4, {"method": "lora"}),
    "fsdp, accumulation": (2, {"gradient_accumulation_steps": 3}),
    "zero3, 4 bits": (2, FOURBIT),
    "zero3, rank 24": (2, {"rank": 24}),
    "zero2, bf16, nearest": (2, {"bf16": True, "merge_rounding": "nearest"}),
    "zero2, bf16, accumulation, full": (2, FULL | {"bf16": True, "gradient_accumulation_steps": 3}),
    "zero3, bf16, accumulation, full": (2, FULL | {"bf16": True, "gradient_accumulation_steps": 3}),
    "zero1, bf16, accumulation": (2, {"bf16": True, "gradient_accumulation_steps": 3}),
    "fsdp, full": (2, FULL),
    "local, pissa": (1, {"method": "pissa", "lora_dropout": None}),
    "local, offloaded activations": (1, {"activation_offloading": True}),
    "zero3, offloaded activations, checkpointing": (
        2,
        {"activation_offloading": True, "gradient_checkpointing": True},
    ),
}
QUICK = ("zero3, bf16, checkpointing", "fsdp, bf16, checkpointing", "local, 4 bits")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("planned"), **SIZES)


@pytest.mark.floors
@pytest.mark.parametrize(
    "setup", [pytest.param(x, marks=() if x in QUICK else pytest.mark.heavy) for x in SETUPS]
)
def test_a_plan_is_within_a_twentieth_of_what_tensors_take(
    ranks: Any, task: Path, tmp_path: Path, setup: str
) -> None:
    size, others = SETUPS[setup]
    engine = setup.split(",")[0]
    options = tiny_runs.options(
        task,
        tmp_path / "run",
        engine,
        **{"max_length": 160, "per_device_train_batch_size": 2, "train_batch_size": None},
        **{"lora_dropout": None if "full" in setup else 0.0, **others},
    )
    found = ranks(size).run(measured, options)
    plan = planned(options, size)
    near = partial(pytest.approx, rel=0.1 if "full" in setup else 0.05)
    assert plan.peak.total == near(max(f.tracked for f in found))
    assert plan.staged == near(max(f.staged for f in found))
    totals = {moment.phase: moment.total for moment in plan.phases}
    # The test keeps fetched activations, which a GPU has used by then.
    for phase in () if "offloaded" in setup else found[0].phases:
        assert totals[phase] == pytest.approx(max(f.phases[phase] for f in found), rel=0.06)
    if "grams" in totals and "offloaded" not in setup:  # to scale never takes more than the grams
        assert totals["grams"] >= 0.97 * max(f.scale for f in found)
    assert found[0].phases.keys() == totals.keys() & PHASES.keys()
    if size > 1:
        assert plan.gathered == pytest.approx(max(f.gathered for f in found), rel=0.1)
    if size == 2:  # a reduction fills as many bytes here as a rank receives
        reduced = [m for m in (*plan.messages, *plan.rescale) if m.summed]
        received = sum(message.received for message in reduced)
        assert received == pytest.approx(max(f.reduced for f in found), rel=0.1)


PARAMETERS = {
    "google/gemma-3-12b-pt": 12.19,
    "meta-llama/Llama-2-7b-hf": 6.74,
    "meta-llama/Meta-Llama-3-8B": 8.03,
    "meta-llama/Meta-Llama-3-70B": 70.55,
    "microsoft/deberta-v3-base": 0.184,
}


@pytest.mark.floors
@pytest.mark.parametrize("model", PARAMETERS)
def test_the_papers_models_are_here(model: str) -> None:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModel

    with init_empty_weights():
        found = AutoModel.from_config(AutoConfig.from_pretrained(config_folder(model)))
    head = found.get_input_embeddings().weight.numel() if "Llama" in model else 0
    billions = (sum(p.numel() for p in found.parameters()) + head) / 1e9
    assert billions == pytest.approx(PARAMETERS[model], rel=0.005)
    assert config_folder(model) == str(SHIPPED / model)
    assert config_folder(model, "a-revision") == model  # of the hub: ours is the main branch's


def plan_tool(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scalora_dist", "plan", *words],
        cwd=ROOT,
        env=os.environ | launched.ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=540,
    )


def plan_of(*words: str, gpus: int = 2) -> Plan:
    options = parse_options([*words, "--max_length", "64", "--rank", "4", "--output_dir", "."])
    return Planner(options, PlanArguments()).plan(options, gpus)


def test_a_mixed_engine_keeps_fp32_and_gathers_bf16(task: Path) -> None:
    """launch/fsdp/mixed.yaml: no low halves, and messages of half the size."""
    words = ["--model_name_or_path", str(task), "--fsdp"]
    plain = plan_of(*words)
    mixed = plan_of(*words, "--fsdp_config", "launch/fsdp/mixed.yaml")
    assert mixed.held.device == plain.held.device
    assert mixed.messages[0].received == plain.messages[0].received / 2


def test_logits_that_a_model_changes_are_planned_whole(tmp_path: Path) -> None:
    """As they are trained: Gemma-2's softcapping comes after the LM head."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    peaks = []
    for cap in (None, 5.0):
        config = Gemma2Config(**sizes, vocab_size=50_000, final_logit_softcapping=cap)
        config.save_pretrained(tmp_path / str(cap))
        words = ["--model_name_or_path", str(tmp_path / str(cap))]
        peaks.append(plan_of(*words, "--per_device_train_batch_size", "64", gpus=1).peak.total)
    whole = 4 * 50_000 * 64 * 63
    assert peaks[0] < 2.5 * whole < 4 * whole < peaks[1]


@pytest.mark.parametrize(("positions", "planned_for"), [(48, 48), (96, 64)])
def test_examples_are_no_longer_than_a_models_positions(
    tmp_path: Path, positions: int, planned_for: int
) -> None:
    """--max_length 64 may be beyond them, if no example is so long."""
    MptConfig(d_model=32, n_heads=4, n_layers=1, max_seq_len=positions).save_pretrained(tmp_path)
    plan = plan_of("--model_name_or_path", str(tmp_path), gpus=1)
    assert plan.options.data.max_length == planned_for


def test_gpus_of_a_node_that_need_different_bytes_each_have_their_own_card(
    task: Path, tmp_path: Path
) -> None:
    (tmp_path / "mesh.yaml").write_text("mesh_shape: [2, 4]\n")
    words = [
        "--model_name_or_path",
        str(task),
        "--fsdp",
        "--fsdp_config",
        str(tmp_path / "mesh.yaml"),
    ]
    plan, where = plan_of(*words, gpus=8), PlanArguments(nodes=2, gpus_per_node=4, network=1.0)
    (replicas,) = [m for m in plan.messages if m.what == "gradients of replicas"]
    assert replicas.received == 4 * plan.trained / 4
    assert least_times_of(plan, where).network == pytest.approx(replicas.received / 1e9)


def test_it_says_what_to_change(task: Path, tmp_path: Path) -> None:
    words = ["--model_name_or_path", str(task), "--rank", "4", "--output_dir", "."]
    words += ["--ds_config", "ds_configs/zero2.json"]
    words += ["--per_device_train_batch_size", "4096", "--max_length", "512"]
    where = PlanArguments(gpu="l4-24g", gpus_per_node=2, json=str(tmp_path / "plan.json"))
    said = report(parse_options(words), where)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert not plan["fits"] and plan["peak_bytes"] > 22 * 2**30
    assert "DOES NOT FIT" in said and "with --gradient_checkpointing" in said
    assert "smallest set-up that fits: 1 × l4-24g" in said
    for phase in plan["phases"].values():
        assert phase.pop("total") == pytest.approx(sum(phase.values()))


def test_a_mistake_is_one_sentence(task: Path) -> None:
    done = plan_tool("--model", str(task), "--gpu", "h100")
    assert done.returncode == 2
    assert "--gpu h100: choose one of" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("where", "words", "says"),
    [
        ({"nodes": 0}, [], "set at least 1"),
        ({"network": 0.0}, [], "set a positive number"),
        ({"json": "nowhere/plan.json"}, [], "its folder does not exist"),
        ({"model": "nowhere/config.json"}, [], "has a config.json"),
        ({}, ["--fsdp", "--method", "lora", "--scaling_rule", "nnls"], "--scaling_rule"),
        ({}, ["--fsdp", "--train_batch_size", "3"], "no multiple of 8 rank"),
        ({}, ["--fsdp", "--rank", "1000"], "rank 1000 does not fit"),
        ({}, [], "8 ranks need an engine"),
        ({}, ["--fsdp", "--ds_config", "ds_configs/zero3.json"], "two engines"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    task: Path, where: dict[str, Any], words: list[str], says: str
) -> None:
    options = ["--model_name_or_path", str(task), "--output_dir", ".", *words]
    with pytest.raises(UserError, match=re.escape(says)):
        report(parse_options(options), PlanArguments(**where))


@pytest.mark.heavy
@pytest.mark.parametrize("model", ["google/gemma-3-12b-pt", "microsoft/deberta-v3-base"])
def test_the_papers_models_are_planned(model: str) -> None:
    words = ["--output_dir", ".", "--ds_config", "ds_configs/zero3.json", "--bf16"]
    words += ["--gradient_checkpointing"]  # as the smallest set-up: one trace serves both
    said = report(parse_options(words), PlanArguments(model=model, gpus_per_node=2))
    assert "smallest set-up that fits: 1 × h100-80g" in said
    # In MiB or GiB, 16-bit weights on two ranks.
    unit = 2**30 if "GiB of a GPU" in said else 2**20
    (base,) = re.findall(r"^  base +([0-9.]+)", said, re.MULTILINE)
    assert float(base) * unit == pytest.approx(PARAMETERS[model] * 1e9, rel=0.01)


def test_a_dry_run_prints_the_plan_and_leaves_nothing(task: Path, tmp_path: Path) -> None:
    """For the ranks of the launcher's environment. It shows examples, if asked to."""
    case = tiny_runs.options(task, tmp_path / "run", "zero3", dry_run=True, show_examples=2)
    done = subprocess.run(
        [sys.executable, "launch/train.py", *runs.words(case)],
        cwd=ROOT,
        env=os.environ
        | launched.ENVIRONMENT
        | {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    assert "2 node(s) × 2" in done.stdout and "gathered weights" in done.stdout
    assert "--- example 2 of " in done.stdout and "[[" in done.stdout
    assert not (tmp_path / "run").exists()


def test_more_gpus_take_less_of_each_and_more_messages(task: Path) -> None:
    words = ["--model_name_or_path", str(task), "--ds_config", runs.ds_config("zero3")]
    options = parse_options([*words, "--max_length", "64", "--rank", "4", "--output_dir", "."])
    planner = Planner(options, PlanArguments())
    two, eight = planner.plan(options, 2), planner.plan(options, 8)
    assert len(planner.traces) == 1
    assert eight.held.device["base"] < 0.26 * two.held.device["base"]
    assert sum(m.received for m in eight.messages) > 1.5 * sum(m.received for m in two.messages)
    # The same messages between nodes take as long as the slower network says.
    slow, fast = (PlanArguments(nodes=2, gpus_per_node=4, network=x) for x in (1.0, 10.0))
    assert least_times_of(eight, slow).network == pytest.approx(
        10 * least_times_of(eight, fast).network
    )
    assert least_times_of(two, PlanArguments(gpus_per_node=2)).network == 0


@pytest.mark.parametrize(
    ("reported", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA H100 PCIe", "h100-pcie-80g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA H200", "h200-141g"),
        ("NVIDIA L40S", "l40s-48g"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24g"),
        ("Tesla T4", None),
    ],
)
def test_gpus_are_known_by_the_name_they_report(reported: str, key: str | None) -> None:
    assert find_gpu(reported) == (GPUS[key] if key else None)
