"""Runs that start from an adapter, and the adapters that they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scalora_dist.config.parser import parse_options
from scalora_dist.errors import UserError
from scalora_dist.methods.method import AddContext
from scalora_dist.methods.registry import METHODS
from scalora_dist.model_io.import_adapter import SavedAdapter
from scalora_dist.training.resolve import resolve_merges
from tests.support import runs, tiny_runs
from tests.support.ranks import Ranks
from tests.support.refusals import one_sentence
from tests.support.workers import adapter as work
from tests.support.workers.adapter import CARRY, RANK, differ, options, size

GetRanks = Callable[[int], Ranks]
HEAVY = pytest.mark.heavy
FACTOR = "model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def left(ranks: GetRanks, odd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LoRA's."""
    run = tmp_path_factory.mktemp("left") / "run"
    ranks(1).run(runs.run, options(odd, run, method="lora"))
    return run


@pytest.mark.parametrize(
    ("engine", "others"),
    [
        ("local", {"method": "lora", "lora_alpha": 3}),
        ("zero3", {"method": "lora", "lora_alpha": 3}),
        ("fsdp", {"method": "scalora"}),
        ("local", {"method": "scalora", "merge_target": "carry"}),
        pytest.param("zero2", {"method": "lora-plus", "lora_alpha": 3}, marks=HEAVY),
    ],
)
def test_a_run_goes_on_from_an_adapter(
    ranks: GetRanks, odd: Path, left: Path, tmp_path: Path, engine: str, others: dict[str, Any]
) -> None:
    case = options(odd, tmp_path / "run", engine, max_steps=2, **others)
    case["adapter_name_or_path"] = left / "adapter"
    _, _, heard = ranks(size(engine)).run(tiny_runs.train, case)[0]
    method = "" if others.get("method") == "lora" else "--method lora "
    told = [text.rpartition(": ")[2] for text in heard if "was trained with" in text]
    assert told == (
        [f"to train as before, set {method}--lora_alpha 8"] if "lora_alpha" in others else []
    )
    first, last = work.held_out(left)
    start, end = work.held_out(tmp_path / "run")
    assert last < first - 0.1
    assert start == pytest.approx(last, rel=1e-5)
    assert end < start


@pytest.mark.parametrize(
    ("engine", "others"),
    [
        ("local", {"method": "lora"}),
        ("fsdp", {"method": "lora", "rank": 5, "lora_alpha": 12, "bf16": True}),
        ("zero3", {"method": "lora-alpha", "alpha_variant": "II", "lora_alpha": None}),
        pytest.param("local", {"method": "rslora", "bf16": True}, marks=HEAVY),
        pytest.param("zero2", {"method": "lora-plus", "bf16": True}, marks=HEAVY),
    ],
)
def test_a_run_goes_on_as_if_it_had_not_ended(
    ranks: GetRanks, odd: Path, tmp_path: Path, engine: str, others: dict[str, Any]
) -> None:
    """A and B are those of the run before: exactly for an s that is a power of two (8/4 = 2)."""
    group = ranks(size(engine))
    others = {"learning_rate": 1e-3, "eval_steps": 2} | others
    half = options(odd, tmp_path / "half", engine, **others, max_steps=2)
    before, _ = group.run(work.train_and_gather, half)[0]
    group.run(runs.run, options(odd, tmp_path / "all", engine, **others, max_steps=4))
    # A step so small that it changes nothing.
    still = options(
        odd, tmp_path / "on", engine, **others | {"learning_rate": 1e-30, "max_steps": 1}
    )
    still["adapter_name_or_path"] = tmp_path / "half" / "adapter"
    after, heard = group.run(work.train_and_gather, still)[0]
    exact = others["method"] in ("lora", "lora-plus") and "rank" not in others
    for name, value in before.items():
        assert value.any()
        if exact or name.endswith(".B"):
            np.testing.assert_array_equal(after[name], value)
        else:
            np.testing.assert_array_max_ulp(after[name], value, maxulp=1)
    reached = work.held_out(tmp_path / "all")[1]
    start = work.held_out(tmp_path / "on")[0]
    assert start == reached if exact else start == pytest.approx(reached, rel=1e-6)
    assert not [text for text in heard if "was trained with" in text]


@pytest.mark.floors
def test_a_run_goes_on_from_peft_s_adapter(ranks: GetRanks, odd: Path, tmp_path: Path) -> None:
    """One that PEFT wrote, with rsLoRA's scaling and two layers that differ."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK,
        lora_alpha=3,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        alpha_pattern={"down_proj": 5, r"^model\.layers\.[1-9]\d*\.self_attn\.(q|k)_proj": 7},
        init_lora_weights=False,
    )
    model = get_peft_model(work.base(odd), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    case = options(odd, tmp_path / "run", method="lora", learning_rate=1e-30, max_steps=1)
    case |= {"adapter_name_or_path": tmp_path / "adapter", "target_modules": "q_proj down_proj"}
    assert differ(ranks(1).run(work.train, case)[0], work.logits(model)) < 1e-4


@pytest.mark.parametrize("engine", ["local", "zero3", pytest.param("fsdp", marks=HEAVY)])
@pytest.mark.parametrize(
    ("bf16", "alpha"),
    [(False, 3), pytest.param(True, 3, marks=HEAVY), pytest.param(True, 8, marks=HEAVY)],
)
def test_a_carry_goes_on(
    ranks: GetRanks, even: Path, tmp_path: Path, engine: str, bf16: bool, alpha: int
) -> None:
    """On another engine than it came from, its empty columns left out; then from a checkpoint."""
    case = options(even, tmp_path / "a", **CARRY, bf16=bf16, max_steps=2)
    ranks(1).run(runs.run, case | {"carry_rank": 12})
    case = options(even, tmp_path / "b", engine, **CARRY, bf16=bf16, save_steps=2)
    case |= {"carry_rank": 12, "lora_alpha": alpha}
    case |= {"adapter_name_or_path": tmp_path / "a" / "adapter"}
    group = ranks(size(engine))
    group.run(runs.run, case)
    _, last = work.held_out(tmp_path / "a")
    start, end = work.held_out(tmp_path / "b")
    # The forward reads A in 16 bits, which another s rounds differently.
    assert start == pytest.approx(last, rel=1e-3 if bf16 and alpha == 3 else 1e-5)
    assert end < start
    records = [x for x in runs.metrics(tmp_path / "b") if "carry" in x]
    # 8 columns of 16 are used: two more merges fit.
    assert next(x["step"] for x in records) == 3
    # What a checkpoint holds is not started from anew, and the adapter may be gone.
    expected = tiny_runs.lines(tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-4")
    shutil.rmtree(tmp_path / "b" / "adapter")
    shutil.rmtree(tmp_path / "a")
    group.run(runs.run, case | {"resume_from_checkpoint": "latest"})
    assert tiny_runs.lines(tmp_path / "b") == expected
    assert (tmp_path / "b" / "adapter" / "adapter_model.safetensors").is_file()


# --- refusals ------------------------------------------------------------------------------------


def read(case: dict[str, Any]) -> None:
    """What the trainer does with a saved adapter before it trains."""
    parsed = parse_options(runs.words(case))
    parsed = replace(parsed, method=resolve_merges(parsed.method, quantized=False))
    saved = SavedAdapter(parsed)
    model = work.base(Path(str(parsed.model.model_name_or_path)))
    method = METHODS[parsed.method.name]
    saved.check(method.add(model, AddContext(parsed.method, 0, torch.float32)))


def scalings(folder: Path) -> dict[str, float]:
    """{layer: s} of a saved adapter."""
    words = {"output_dir": folder, "adapter_name_or_path": folder, "method": "lora", "rank": RANK}
    saved = SavedAdapter(parse_options(runs.words(words)))
    return {layer: saved.scaling.of(layer, rank) for layer, (_, _, rank) in saved.sizes.items()}


def test_patterns_that_re_would_not_finish(left: Path, tmp_path: Path) -> None:
    """Each has 2ⁿ ways to match a layer's name of n characters, and only the last one matches."""
    folder = shutil.copytree(left / "adapter", tmp_path / "adapter")
    endless = [r"([\w.]+)+!", r"([\w.]*)*!", r"(\w|\w|\.)*!", "(.?)+" * 9 + "!"]
    given = {"alpha_pattern": dict.fromkeys(endless, 3) | {r"(\w+)+_proj": 5}}
    set_config(**given, lora_alpha=7)(folder)
    found = scalings(folder)
    assert set(found.values()) == {5 / RANK}
    set_config(alpha_pattern=dict.fromkeys(endless, 3))(folder)
    assert scalings(folder) == dict.fromkeys(found, 7 / RANK)


def test_factors_that_are_not_finite_are_refused(
    ranks: GetRanks, odd: Path, left: Path, tmp_path: Path
) -> None:
    """In the file, or after they are scaled. They are read last, layer by layer."""
    for name, spoil in {
        "infinite": change(FACTOR, lambda tensor: tensor.fill_(torch.inf)),
        "large": set_config(lora_alpha=1e300),
    }.items():
        folder = shutil.copytree(left / "adapter", tmp_path / name)
        spoil(folder)
        case = options(odd, tmp_path / "run", "zero3", method="lora", adapter_name_or_path=folder)
        for message, status, _ in ranks(2).run(tiny_runs.refusal, case):
            assert "is not finite, or not after it is scaled by s = " in message and status == 2
            assert message.startswith(f"--adapter_name_or_path {folder}: A or B of model.layers.0")


Spoil = Callable[[Path], object]


def set_config(**settings: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return spoil


def rename(old: str, new: str) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file({key.replace(old, new): x for key, x in tensors.items()}, path)

    return spoil


def change(key: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """Edit the tensor of the key that ends so."""

    def spoil(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        found = {name: edit(x) if name.endswith(key) else x for name, x in tensors.items()}
        save_file(found, path)

    return spoil


def describe(entry: Any) -> Spoil:
    """Write our entry of the file's metadata: a text, or what becomes one."""

    def spoil(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        text = entry if isinstance(entry, str) else json.dumps(entry)
        save_file(load_file(path), path, {"format": "pt", "scalora_dist": text})

    return spoil


def write(file: str, text: str) -> Spoil:
    return lambda folder: (folder / file).write_text(text)


def remove(file: str) -> Spoil:
    return lambda folder: (folder / file).unlink()


@pytest.mark.parametrize(
    ("spoil", "others", "words"),
    [
        (shutil.rmtree, {}, "no such folder"),
        (remove("adapter_config.json"), {}, "has no adapter_config.json"),
        (remove("adapter_model.safetensors"), {}, "has no adapter_model.safetensors"),
        (write("adapter_config.json", "{"), {}, "is no JSON"),
        (write("adapter_config.json", "[]"), {}, "is no JSON object"),
        (write("adapter_model.safetensors", "x" * 99), {}, "is damaged"),
        (set_config(peft_type="IA3"), {}, "peft_type IA3"),
        (set_config(use_dora=True), {}, "use_dora"),
        (set_config(bias="all"), {}, "bias all"),
        (set_config(lora_alpha="8"), {}, "lora_alpha or alpha_pattern is damaged"),
        (set_config(alpha_pattern={"(": 8}), {}, "lora_alpha or alpha_pattern is damaged"),
        *(
            (set_config(lora_alpha=bad), {}, "is no positive number: correct adapter_config.json")
            for bad in (
                float("nan"),
                float("inf"),
                0,
                -8,
                10**400,
                None,
                True,
                [8],
                {"a": "b" * 99},
            )
        ),
        (set_config(alpha_pattern={"q_proj": "8"}), {}, "alpha '8' is no positive number"),
        (set_config(alpha_pattern=["q_proj"]), {}, "alpha_pattern is no JSON object"),
        *(
            (set_config(alpha_pattern={bad: 8}), {}, f"cannot read character {at} of the pattern ")
            for bad, at in (("a{9}", 2), (r"(a)\1", 4), ("(?=a)b", 2), ("[z-a]", 1), ("a\n*++", 4))
        ),
        (set_config(alpha_pattern={"a" * 1001: 8}), {}, "longer than 1000 characters"),
        (set_config(bias="a\nb\x1b[2J"), {}, "has bias a b [2J"),
        (write("adapter_config.json", "[" * 100_000), {}, "is no JSON"),
        (change(FACTOR, lambda x: x[0]), {}, "do not fit together"),
        (change(FACTOR, lambda x: x[:0]), {}, "do not fit together"),
        (change("weight", lambda x: x[..., :0] if len(x) != RANK else x[:0]), {}, "do not fit"),
        (change(FACTOR, lambda x: x.to(torch.int8)), {}, "has dtype I8: save it in one of F64"),
        (describe("{"), {}, "the scalora_dist entry of its metadata is damaged: "),
        (describe("[" * 100_000), {}, "it is nested too deeply: save the tensors without it"),
        (describe([2.0]), {}, "it has no options"),
        *(
            (describe({"options": {"rank": bad}, "scaling": 2.0}), {}, words)
            for bad, words in {
                0: "--rank 0: set at least 1: save the tensors without it",
                4.5: "argument --rank: invalid int value: '4.5'",
                True: "'rank' is True: save the tensors without it",
                9: "rank 9 is none of this adapter's: save the tensors without it",
            }.items()
        ),
        *(
            (
                describe({"options": {"rank": 4}, "scaling": bad}),
                {},
                "is no positive number: save the tensors",
            )
            for bad in (None, 0, -2, True, "2", [2], float("nan"), float("inf"), 10**400)
        ),
        (
            describe({"options": {"rank": 4}, "scaling": {"a": 2.0}}),
            {},
            "it has no scaling of model.layers.0.",
        ),
        (set_config(modules_to_save=["lm_head"]), {}, "modules_to_save"),
        (set_config(init_lora_weights="pissa_niter_4"), {}, "changed its base"),
        (rename(FACTOR, FACTOR.replace("_A", "_embedding_A")), {}, "lora_embedding_A"),
        (rename(FACTOR, FACTOR.replace("q_proj", "x")), {}, "do not fit together"),
        (rename(".q_proj.", ".qq_proj."), {}, "nothing for model.layers.0.self_attn.q_proj: set "),
        (
            rename("", ""),
            {"target_modules": "q_proj"},
            "is not adapted here: set --target_modules down_proj ",
        ),
        (rename("", ""), {"rank": 3}, "has rank 4 there: set --rank 4"),
        (
            rename("", ""),
            {"rank": 2, "method": "scalora", "merge_target": "carry"},
            "set --rank 4, or --carry_rank 2",
        ),
        (
            rename("", ""),
            {"rank": 2, "merge_target": "carry", "carry_rank": 2, "rank_monitor_steps": 1}
            | {"method": "scalora"},
            "--rank_monitor_steps",
        ),
        (rename("", ""), {"method": "lora-xs"}, "no layers of ours with A and B"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    odd: Path, left: Path, tmp_path: Path, spoil: Spoil, others: dict[str, Any], words: str
) -> None:
    folder = shutil.copytree(left / "adapter", tmp_path / "adapter")
    case = options(odd, tmp_path / "run", **{"method": "lora"} | others)
    case["adapter_name_or_path"] = folder
    spoil(folder)
    with pytest.raises(UserError) as error:
        read(case)
    message = one_sentence(error)
    assert words in message and message.startswith(f"--adapter_name_or_path {folder}")


def test_an_adapter_of_another_model_is_refused(
    odd: Path, even: Path, left: Path, tmp_path: Path
) -> None:
    case = options(even, tmp_path / "run", method="lora")
    with pytest.raises(UserError) as error:
        read(case | {"adapter_name_or_path": left / "adapter"})
    assert "q_proj is 30 × 35 there and 64 × 64 in this model" in one_sentence(error)
