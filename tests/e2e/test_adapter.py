"""The adapters that runs leave, against PEFT, transformers and dense algebra."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support import runs, tiny_runs
from tests.support.ranks import Ranks
from tests.support.workers import adapter as work
from tests.support.workers.adapter import CARRY, RANK, differ, options, size

GetRanks = Callable[[int], Ranks]
HEAVY = pytest.mark.heavy
ENGINES = ["local", "zero3", "fsdp", pytest.param("zero2", marks=HEAVY)]


# --- what a run leaves ---------------------------------------------------------------------------


@pytest.mark.floors
@pytest.mark.parametrize("engine", ENGINES)
def test_a_carry_is_an_adapter_of_the_4_bit_base(
    ranks: GetRanks, even: Path, tmp_path: Path, engine: str
) -> None:
    run = tmp_path / "run"
    case = options(even, run, engine, save_model=True, **CARRY)
    trained = ranks(size(engine)).run(work.train, case)[0]
    compressed = [x["carry"]["compressed"] for x in runs.metrics(run) if "carry" in x]
    assert len(compressed) > 1
    config = work.config(run)
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (6 + RANK, {}, {})
    assert config["base_model_name_or_path"] == str(even)
    assert len(config["target_modules"]) == 7
    untrained = work.logits(work.base(even, fourbit=True))
    assert differ(trained, untrained) > 0.1
    assert differ(work.by_peft(even, run, fourbit=True), trained) < 1e-4
    dense = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    assert not hasattr(dense.config, "quantization_config")
    assert all(type(x) is torch.nn.Linear for x in dense.modules() if hasattr(x, "in_features"))
    assert differ(work.logits(dense), trained) < 1e-4


def test_a_carry_with_columns_to_spare_keeps_its_rank(
    ranks: GetRanks, even: Path, tmp_path: Path
) -> None:
    """What was not used is zero. A bf16 carry's low halves are in: any base's tensors are fp32."""
    run = tmp_path / "run"
    case = options(even, run, max_steps=1, bf16=True, load_in_4bit=True, carry_rank=12)
    ranks(1).run(work.train, case)
    for key, tensor in load_file(run / "adapter" / "adapter_model.safetensors").items():
        assert tensor.dtype == torch.float32
        columns = tensor if "lora_A" in key else tensor.T
        assert columns.shape[0] == 12 + RANK
        assert not columns[RANK:12].any() and columns[12:].any(1).all()
        assert not torch.equal(columns, columns.bfloat16().float())


@pytest.mark.parametrize(
    ("method", "engine", "variant"),
    [
        ("lora", "fsdp", ""),
        ("lora-alpha", "zero3", "II"),
        ("lora-xs", "fsdp", ""),
        pytest.param("lora-alpha", "local", "I", marks=HEAVY),
        pytest.param("rslora", "zero3", "", marks=HEAVY),
        pytest.param("lora-plus", "fsdp", "", marks=HEAVY),
        pytest.param("lora-pro", "zero3", "", marks=HEAVY),
        pytest.param("lora-sb", "zero3", "", marks=HEAVY),
    ],
)
def test_what_is_trained_is_the_adapter(
    ranks: GetRanks, odd: Path, tmp_path: Path, method: str, engine: str, variant: str
) -> None:
    """The global r and lora_alpha suffice, also where each layer has its own s."""
    case = options(odd, tmp_path / "run", engine, method=method)
    if method == "lora-alpha":
        case |= {"alpha_variant": variant, "learning_rate": 1e-3}
    if method in ("lora-alpha", "lora-sb"):
        del case["lora_alpha"]
    trained = ranks(size(engine)).run(work.train, case)[0]
    assert differ(trained, work.logits(work.base(odd))) > 0.01
    assert differ(work.by_peft(odd, tmp_path / "run"), trained) < 1e-4
    assert differ(work.by_transformers(odd, tmp_path / "run"), trained) < 1e-4
    config = work.config(tmp_path / "run")
    assert config["lora_alpha"] == config["r"] == RANK
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not (tmp_path / "run" / "model").exists()


def test_a_few_layers_are_named_in_full(ranks: GetRanks, odd: Path, tmp_path: Path) -> None:
    names = ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "layers.1.mlp.gate_proj"]
    case = options(odd, tmp_path / "run", method="lora", target_modules=" ".join(names))
    trained = ranks(1).run(work.train, case)[0]
    assert set(work.config(tmp_path / "run")["target_modules"]) == {f"model.{x}" for x in names}
    assert differ(work.by_peft(odd, tmp_path / "run"), trained) < 1e-4


def test_what_a_server_may_refuse_is_told_once(ranks: GetRanks, odd: Path, tmp_path: Path) -> None:
    for rank, expected in ((8, 0), (513, 1)):
        case = options(odd, tmp_path / str(rank), "fsdp", adapter_rank=rank, max_steps=1)
        answers = ranks(2).run(tiny_runs.train, case | {"target_modules": "q_proj"})
        told = [text for _, _, heard in answers for text in heard if "vLLM" in text]
        assert len(told) == expected
        assert all("rank 513 is above 512" in text for text in told)
        assert (tmp_path / str(rank) / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_without_factors_leaves_no_adapter(
    ranks: GetRanks, odd: Path, tmp_path: Path
) -> None:
    unread: dict[str, Any] = {"rank": None, "lora_alpha": None, "lora_dropout": None}
    for method, others in {"full": unread, "mora": {"lora_alpha": None}, "scalora": {}}.items():
        case = options(odd, tmp_path / method, method=method, max_steps=1, **others)
        ranks(1).run(runs.run, case)
        assert (tmp_path / method / "summary.json").is_file()
        assert not (tmp_path / method / "adapter").exists()


# --- what was merged, approximated ---------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_the_stated_error_is_what_the_adapter_misses(
    ranks: GetRanks, odd: Path, tmp_path: Path, engine: str
) -> None:
    run = tmp_path / "run"
    case = options(odd, run, engine, adapter_rank=3, save_model=True)
    ranks(size(engine)).run(runs.run, case)
    after, before = (load_file(folder / "model.safetensors") for folder in (run / "model", odd))
    report = json.loads((run / "adapter" / "approximation.json").read_text())
    found = work.products(run)
    assert report["rank"] == 3 and set(report["relative_error"]) == set(found)
    assert work.config(run)["lora_alpha"] == work.config(run)["r"] == 3
    for layer, stated in report["relative_error"].items():
        key = f"{layer}.weight"
        update = after[key].double() - before[key].double()
        error = float((update - found[layer]).norm() / update.norm())
        assert stated == pytest.approx(error, rel=1e-3)
        best = torch.linalg.svdvals(update)[3:].norm() / update.norm()
        assert 1e-3 < stated == pytest.approx(float(best), rel=1e-2)


@pytest.mark.parametrize(
    ("engine", "method"),
    [("fsdp", "scalora"), ("zero3", "relora"), pytest.param("local", "scalora", marks=HEAVY)],
)
def test_full_rank_misses_nothing(
    ranks: GetRanks, odd: Path, tmp_path: Path, engine: str, method: str
) -> None:
    """More than the layers' ranks, which are not all the same: zero columns fill them up."""
    case = options(odd, tmp_path / "run", engine, method=method, adapter_rank=35)
    if method == "relora":
        case |= {"relora_interval": 2, "relora_warmup_steps": 1}
    trained = ranks(size(engine)).run(work.train, case)[0]
    assert differ(trained, work.logits(work.base(odd))) > 0.1
    assert differ(work.by_peft(odd, tmp_path / "run"), trained) < 1e-4
    config = work.config(tmp_path / "run")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["lora_alpha"] == config["r"] == 35


@HEAVY
@pytest.mark.parametrize("engine", ["local", "zero2", "zero3", "fsdp"])
def test_of_a_bf16_base_the_low_halves_count(
    ranks: GetRanks, odd: Path, tmp_path: Path, engine: str
) -> None:
    run = tmp_path / "run"
    case = options(odd, run, engine, adapter_rank=5, bf16=True)
    merged = ranks(size(engine)).run(work.train_and_merge, case)[0]
    before, found = load_file(odd / "model.safetensors"), work.products(run)
    report = json.loads((run / "adapter" / "approximation.json").read_text())
    for layer, stated in report["relative_error"].items():
        update = torch.from_numpy(merged[layer]).double()
        update -= before[f"{layer}.weight"].bfloat16().double()
        error = float((update - found[layer]).norm() / update.norm())
        assert stated == pytest.approx(error, rel=1e-3)


def test_the_base_may_be_in_several_files_with_other_prefixes(
    ranks: GetRanks, odd: Path, tmp_path: Path
) -> None:
    """They are links to files elsewhere, as in the cache of a hub."""
    task = shutil.copytree(odd, tmp_path / "task")
    (task / "model.safetensors").unlink()
    (tmp_path / "blobs").mkdir()
    files: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    index = {}
    for i, (name, tensor) in enumerate(load_file(odd / "model.safetensors").items()):
        # As saved without a head; transformers finds them nonetheless.
        file, key = list(files)[i % 2], name.removeprefix("model.")
        files[file][key], index[key] = tensor, file
    for file, tensors in files.items():
        save_file(tensors, tmp_path / "blobs" / file, {"format": "pt"})
        (task / file).symlink_to(f"../blobs/{file}")
    described = {"metadata": {}, "weight_map": index}
    (task / "model.safetensors.index.json").write_text(json.dumps(described))
    case = options(task, tmp_path / "run", adapter_rank=35)
    trained = ranks(1).run(work.train, case)[0]
    assert differ(work.by_peft(odd, tmp_path / "run"), trained) < 1e-4


def test_the_base_may_be_in_a_pickled_file(ranks: GetRanks, odd: Path, tmp_path: Path) -> None:
    task = shutil.copytree(odd, tmp_path / "task")
    torch.save(load_file(task / "model.safetensors"), task / "pytorch_model.bin")
    (task / "model.safetensors").unlink()
    run = tmp_path / "run"
    trained = ranks(1).run(work.train, options(task, run, adapter_rank=35, save_model=True))[0]
    assert differ(work.by_peft(odd, run), trained) < 1e-4
    dense = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    assert differ(work.logits(dense), trained) < 1e-4


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "others",
    [
        {"method": "lora"},
        {"merge_target": "carry"},
        {"method": "full", "rank": None, "lora_alpha": None, "lora_dropout": None},
        {"adapter_rank": 0},
    ],
)
def test_adapter_rank_where_it_means_nothing_is_refused(
    ranks: GetRanks, odd: Path, tmp_path: Path, others: dict[str, Any]
) -> None:
    case = options(odd, tmp_path / "run", **{"adapter_rank": 3} | others)
    ((message, status, _),) = ranks(1).run(tiny_runs.refusal, case)
    assert status == 2 and "\n" not in message and message.startswith("--adapter_rank")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", ["local", pytest.param("fsdp", marks=HEAVY)])
def test_another_base_than_was_loaded_is_refused(
    ranks: GetRanks, odd: Path, tmp_path: Path, engine: str
) -> None:
    case = options(odd, tmp_path / "run", engine, adapter_rank=3)
    message, status, _ = ranks(size(engine)).run(work.refusal_of_another_base, case)[0]
    assert status == 2 and "\n" not in message
    assert "its files hold another model.layers.1.mlp.up_proj.weight than was loaded" in message
