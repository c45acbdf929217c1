"""What runs export: against ``save_pretrained``, and against ``scalora export`` of a checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from scalora_dist.checkpoint.manifest import write_synced
from scalora_dist.errors import UserError
from scalora_dist.export.command import export_command
from tests.support import families, hub, tiny_models, tiny_runs
from tests.support.hub import StandIn
from tests.support.ranks import Ranks
from tests.support.refusals import one_sentence
from tests.support.workers import adapter as work
from tests.support.workers.adapter import CARRY, options, size

GetRanks = Callable[[int], Ranks]
HEAVY = pytest.mark.heavy
PLAIN = ("lora-xs", "lora-plus", "lora-pro", "dora", "pissa", "lora-ga")
Q_PROJ = {"target_modules": "q_proj"}
NO_LORA: dict[str, Any] = dict.fromkeys(("rank", "lora_alpha", "lora_dropout"))


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return work.save_even_task(tmp_path_factory.mktemp("even"))


def export(checkpoint: Path, folder: Path, *words: str, base: Path | None = None) -> Path:
    given = ["--model_name_or_path", str(base)] if base else []
    export_command([str(checkpoint), "--output", str(folder), *words, *given])
    return folder


def refusal(checkpoint: Path, folder: Path, *words: str) -> str:
    with pytest.raises(UserError) as error:
        export(checkpoint, folder, *words)
    assert not folder.exists() and not folder.with_name(f"{folder.name}.partial").exists()
    return one_sentence(error)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def same(folder: Path, other: Path, *, exact: bool) -> None:
    if exact:
        assert contents(folder) == contents(other)
        return
    assert contents(folder).keys() == contents(other).keys()
    tensors = updates(families.tensors(other))
    for name, tensor in updates(families.tensors(folder)).items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-2, atol=1e-5, msg=name)


def updates(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The products of an adapter's factors; all tensors of a model."""
    left = [name for name in tensors if "lora_B" in name]
    products = {name: tensors[name] @ tensors[name.replace("lora_B", "lora_A")] for name in left}
    return products or tensors


# --- what a run leaves ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "engine", "others"),
    [
        ("gpt_neox", "zero3", {}),
        ("mixtral", "fsdp", {"target_modules": "q_proj v_proj"}),
        pytest.param("gpt_neox", "fsdp", {"bf16": True}, marks=HEAVY),
        pytest.param("mixtral", "zero3", Q_PROJ | {"bf16": True}, marks=HEAVY),
        pytest.param("deepseek_v3", "zero2", {"target_modules": "o_proj"}, marks=HEAVY),
        pytest.param("ernie4_5_moe", "zero3", Q_PROJ, marks=HEAVY),
        pytest.param("ernie4_5_moe", "zero3", Q_PROJ | {"bf16": True}, marks=HEAVY),
        pytest.param("ernie4_5_moe", "fsdp", Q_PROJ | {"bf16": True}, marks=HEAVY),
        pytest.param(
            "nemotron_h", "local", {"target_modules": "up_proj", "bf16": True}, marks=HEAVY
        ),
        pytest.param("gemma3", "zero3", {"bf16": True}, marks=HEAVY),
        pytest.param("gemma3", "fsdp", {}, marks=HEAVY),
        pytest.param("tied", "zero1", {}, marks=HEAVY),
    ],
)
def test_a_run_leaves_what_save_pretrained_writes(
    ranks: GetRanks, tmp_path: Path, family: str, engine: str, others: dict[str, Any]
) -> None:
    """The base with the saved adapter's update, by transformers and plain algebra."""
    base, run = families.save(family, tmp_path / "base"), tmp_path / "run"
    case = options(base, run, engine, method="lora", save_model=True, rank=2, **others)
    ranks(size(engine)).run(tiny_runs.train, case)
    dtype = torch.bfloat16 if others.get("bf16") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    layers = {key.rsplit(".", 2)[0] for key in saved}
    with torch.no_grad():
        for layer in layers:
            weight = model.get_parameter(f"{layer.removeprefix('base_model.model.')}.weight")
            a, b = (saved[f"{layer}.{key}.weight"] for key in ("lora_B", "lora_A"))
            weight.copy_(weight.float() + a @ b)
    model.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "theirs")
    ours, theirs = families.tensors(run / "model"), families.tensors(tmp_path / "theirs")
    assert {n: (x.dtype, x.shape) for n, x in ours.items()} == {
        n: (x.dtype, x.shape) for n, x in theirs.items()
    }
    trained = {layer.removeprefix("base_model.model.").split(".", 1)[1] for layer in layers}
    for name, tensor in ours.items():
        if any(name.endswith(f"{layer}.weight") for layer in trained):
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=1e-5)
        else:
            assert torch.equal(tensor, theirs[name]), name
    files = {path.name for path in (run / "model").iterdir()}
    assert files == {path.name for path in (tmp_path / "theirs").iterdir()} | {"README.md"}


# --- from a checkpoint ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "others"),
    [
        ("zero3", {"bf16": True}),
        ("local", CARRY),
        ("fsdp", {"method": "lora"}),
        pytest.param("fsdp", {"bf16": True}, marks=HEAVY),
        pytest.param("zero2", {"merge_rounding": "nearest", "bf16": True}, marks=HEAVY),
        pytest.param(
            "zero3", {"merge_target": "carry", "bf16": True, "carry_rank": 6}, marks=HEAVY
        ),
        pytest.param("fsdp", CARRY | {"bf16": True}, marks=HEAVY),
        pytest.param("zero3", {"method": "relora", "relora_interval": 2}, marks=HEAVY),
        pytest.param("zero3", {"method": "full", **NO_LORA}, marks=HEAVY),
        pytest.param("zero2", {"method": "full", "bf16": True, **NO_LORA}, marks=HEAVY),
        *(pytest.param("local", {"method": name}, marks=HEAVY) for name in PLAIN),
        *(
            pytest.param("local", {"method": name, "lora_alpha": None}, marks=HEAVY)
            for name in ("lora-alpha", "lora-sb", "mora", "hira")
        ),
    ],
)
def test_a_checkpoint_gives_what_its_run_has_left(
    ranks: GetRanks, even: Path, tmp_path: Path, engine: str, others: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    case = options(even, run, engine, save_model=True, **others)
    ranks(size(engine)).run(tiny_runs.train, case)
    # Carries are compressed by grams that ranks have summed.
    exact = engine == "local" or "carry_rank" not in others
    same(export(run, tmp_path / "model"), run / "model", exact=exact)
    if (run / "adapter").exists():
        adapter = export(run / "checkpoint-4", tmp_path / "adapter", "--adapter")
        same(adapter, run / "adapter", exact=exact)
    else:
        assert "leaves no adapter" in refusal(run, tmp_path / "adapter", "--adapter")


@pytest.fixture(scope="module")
def trained(even: Path, ranks: GetRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that merged into W, without exports."""
    run: Path = tmp_path_factory.mktemp("trained") / "run"
    ranks(1).run(tiny_runs.train, options(even, run, "local", save_steps=2))
    return run


def test_a_checkpoint_in_the_middle(trained: Path, even: Path, tmp_path: Path) -> None:
    """The model of step 2 is another than that of step 4, and an adapter of full rank is it."""
    first = export(trained / "checkpoint-2", tmp_path / "first")
    last = export(trained, tmp_path / "last")
    assert contents(first)["model.safetensors"] != contents(last)["model.safetensors"]
    export(trained / "checkpoint-2", tmp_path / "adapter", "--adapter_rank", "64")
    shutil.copytree(tmp_path / "adapter", tmp_path / "as_run" / "adapter")
    logits = work.logits(AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32))
    assert work.differ(work.by_peft(even, tmp_path / "as_run"), logits) < 1e-4
    report = json.loads((tmp_path / "adapter" / "approximation.json").read_text())
    assert max(report["relative_error"].values()) < 1e-4


def test_another_dtype(trained: Path, tmp_path: Path) -> None:
    model = families.tensors(export(trained, tmp_path / "model", "--dtype", "bfloat16"))
    whole = families.tensors(export(trained, tmp_path / "whole"))
    assert {tensor.dtype for tensor in model.values()} == {torch.bfloat16}
    for name, tensor in model.items():
        assert torch.equal(tensor, whole[name].bfloat16()), name
    export(trained, tmp_path / "adapter", "--adapter_rank", "3", "--dtype", "float16")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}


def test_what_does_not_fit_is_one_sentence(trained: Path, even: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert "leaves no adapter: set --adapter_rank" in refusal(trained, folder, "--adapter")
    assert "is no checkpoint and holds none" in refusal(even, folder)
    assert "is no folder" in refusal(tmp_path / "nowhere", folder)
    other = shutil.copytree(even, tmp_path / "other")
    tensors = families.tensors(other)
    tensors["model.norm.weight"] = 2 * tensors["model.norm.weight"]
    model = AutoModelForCausalLM.from_pretrained(even)
    model.load_state_dict(tensors, strict=False)
    model.save_pretrained(other)
    told = refusal(trained, folder, "--model_name_or_path", str(other))
    assert "does not hold the weights that the run began from" in told
    assert "there is no such folder" in refusal(
        trained, folder, "--model_name_or_path", str(tmp_path / "gone")
    )
    folder.mkdir()
    with pytest.raises(UserError, match="is there already: name another"):
        export(trained, folder)
    with pytest.raises(UserError, match="name a checkpoint"):
        export_command(["--output", str(tmp_path / "out2")])
    with pytest.raises(UserError, match="--output is missing"):
        export_command([str(trained)])


def test_of_a_run_the_newest_sound_checkpoint_is_taken(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "checkpoint-4" / "rank-00000.safetensors").write_bytes(b"")
    assert contents(export(run, tmp_path / "a")) == contents(
        export(trained / "checkpoint-2", tmp_path / "b")
    )
    assert "checkpoint-4 cannot be used: rank-00000.safetensors has 0 bytes" in caplog.text
    shutil.rmtree(run / "checkpoint-2")
    assert "has no sound checkpoint" in refusal(run, tmp_path / "c")


def test_a_weight_that_no_file_holds_is_one_sentence(ranks: GetRanks, tmp_path: Path) -> None:
    """transformers makes it up when it loads the model; the run itself exports it."""
    base = families.save("llama", tmp_path / "base")
    tensors = families.tensors(base)
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    run = tmp_path / "run"
    case = options(base, run, "local", method="lora", rank=2, max_steps=1, save_model=True)
    ranks(1).run(tiny_runs.train, case)
    assert "lm_head.weight" in families.tensors(run / "model")
    assert "no checkpoint holds lm_head.weight: use the model/" in refusal(run, tmp_path / "out")


@pytest.mark.parametrize("state", ["[]", "{}", "no JSON"])
def test_a_damaged_state_is_one_sentence(trained: Path, tmp_path: Path, state: str) -> None:
    checkpoint = shutil.copytree(trained / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    record = write_synced(checkpoint / "state.json", state.encode())
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = record
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert "state.json" in refusal(checkpoint, tmp_path / "out")


def test_what_is_exported_is_uploaded(trained: Path, tmp_path: Path) -> None:
    push = ("--push_to_hub", "--hub_model_id", "exported")
    with StandIn() as stand_in, hub.used(stand_in.environment(tmp_path)):
        export(trained, tmp_path / "model", *push)
        repository = stand_in.repositories["me/exported"]
        assert repository.private
        sent = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
        assert repository.files() == sent | {".gitattributes": b""}
        with pytest.raises(UserError, match="it holds a model"):
            export(trained, tmp_path / "adapter", "--adapter_rank", "2", *push)
        assert not (tmp_path / "adapter").exists()
    with StandIn() as stand_in, hub.used(stand_in.environment(tmp_path)):
        stand_in.fails = lambda request: 403 if "/commit/" in request else None
        with pytest.raises(UserError) as error:
            export(trained, tmp_path / "again", *push)
    assert "again is whole, but could not be uploaded" in one_sentence(error)
    assert "hf upload me/exported" in str(error.value)
    assert contents(tmp_path / "again") == contents(tmp_path / "model")


@pytest.mark.heavy
def test_it_takes_the_memory_of_one_tensor_and_its_update(ranks: GetRanks, tmp_path: Path) -> None:
    """Memory that is no file's, sampled while 400 MB are written; the largest tensor has 16 MB."""
    base = tmp_path / "base"
    tokenizer = tiny_models.byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    tiny_models.save_texts(base, "abc ", longest=24, count=41)
    run = tmp_path / "run"
    ranks(1).run(tiny_runs.train, options(base, run, "local", max_steps=1, save_model=False))
    words = [
        *map(
            str,
            (sys.executable, "-m", "scalora_dist", "export", run, "--output", tmp_path / "model"),
        )
    ]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen: list[tuple[bool, int]] = []
    while process.poll() is None:
        begun = (tmp_path / "model.partial" / "model.safetensors").exists()
        seen.append((begun, anonymous_bytes(process.pid)))
        time.sleep(0.002)
    assert process.returncode == 0
    before = max(taken for begun, taken in seen if not begun and taken)
    while_writing = max(taken for begun, taken in seen if begun)
    assert sum(begun for begun, _ in seen) > 20
    assert while_writing - before < 4 * 4 * 1024 * 4096


def anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return 1024 * int(lines[0].split()[1]) if lines else 0
