"""The drift tool: its figures on small layers, and a run on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.scale_solver import Scales
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.errors import UserError
from scalora_dist.methods.merger import IntoWeights, Merger
from scalora_dist.methods.scalora import Rescaler
from scalora_dist.profiling.clock import Clock
from tests.support import launched

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "merge_drift.py"
SHAPE, RANK, MERGES = (40, 24), 3, [1, 30, 300]
FP32, SPLIT, NEAREST, ONCE = WAYS = (
    "fp32",
    "bf16, split",
    "bf16, nearest",
    "reference, rounded once",
)
Found = dict[str, dict[int, dict[str, Any]]]  # rows by way and number of merges


def load_tool() -> Any:
    spec = importlib.util.spec_from_file_location("merge_drift", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = random(*SHAPE, seed=0).to(torch.bfloat16)
INPUTS = random(16, SHAPE[1], seed=1)


def increments(size: float, count: int) -> list[tuple[Tensor, Tensor]]:
    """Increments of about ``size`` of W: one direction, and as much noise."""
    left, right = random(SHAPE[0], RANK, seed=2), random(SHAPE[1], RANK, seed=3)
    scale = size * (2 * RANK) ** -0.5
    noise = [random(SHAPE[0], RANK, seed=4 + i) for i in range(count)]
    return [(scale * (left + more), right) for more in noise]


def drifts(size: float, merges: list[int]) -> Found:
    """The rows of a layer after some of its merges."""
    layer = tool.Layer(WEIGHT)
    found: Found = {way: {} for way in WAYS}
    layer.inputs = INPUTS
    for increment in increments(size, merges[-1]):
        layer.merge(*increment)
        if layer.merges in merges:
            for row in layer.measure():
                found[row["way"]][row["merges"]] = row
    return found


# --- figures -------------------------------------------------------------------------------------


# Increments far below half a unit in the last place of a bf16 weight, and about one.
@pytest.fixture(scope="module", params=[1e-5, 1e-3])
def found(request: pytest.FixtureRequest) -> Found:
    return drifts(request.param, MERGES)


def test_split_stores_what_fp32_stores(found: Found) -> None:
    for count in MERGES:
        assert 0 < found[SPLIT][count]["stored"] <= 1.01 * found[FP32][count]["stored"]


def test_split_forward_is_one_rounding_after_any_number_of_merges(found: Found) -> None:
    for count in MERGES:
        once = found[ONCE][count]["forward"]
        assert found[SPLIT][count]["forward"] == pytest.approx(once, rel=0.01)
        assert found[SPLIT][count]["forward"] <= 2**-8  # a bf16 number's largest relative error


def test_nearest_loses_what_split_keeps(found: Found) -> None:
    for count in MERGES:
        assert found[NEAREST][count]["stored"] > 100 * found[SPLIT][count]["stored"]
    last = MERGES[-1]
    assert found[NEAREST][last]["stored"] > 1.5 * found[ONCE][last]["stored"]
    assert found[NEAREST][last]["forward"] > 1.5 * found[ONCE][last]["forward"]


def test_nearest_strays_further_with_every_merge() -> None:
    forward = [row["forward"] for row in drifts(1e-3, MERGES)[NEAREST].values()]
    assert forward[1] > 5 * forward[0] and forward[2] > 5 * forward[1]


def test_bytes_are_those_of_the_tensors(found: Found) -> None:
    assert [found[way][1]["bytes"] for way in WAYS] == [[4], [2, 2], [2], [2]]


def test_one_merge_is_measured_as_it_is_defined() -> None:
    (increment,) = increments(1e-3, 1)
    exact = WEIGHT.double() + increment[0].double() @ increment[1].double().T
    error = exact.to(torch.bfloat16).double() - exact
    row = drifts(1e-3, [1])[NEAREST][1]
    moved = (exact - WEIGHT.double()).norm()
    x = INPUTS.double().T
    assert row["update"] == pytest.approx(float(moved / WEIGHT.double().norm()), rel=1e-6)
    assert row["stored"] == pytest.approx(float(error.norm() / moved), rel=1e-3)
    assert row["forward"] == pytest.approx(float((error @ x).norm() / (exact @ x).norm()), rel=1e-3)


def test_a_layer_is_left_as_it_was() -> None:
    before = WEIGHT.clone()
    drifts(1e-3, [2])
    assert torch.equal(WEIGHT, before)


def test_the_table_has_medians() -> None:
    rows = [
        {"merges": n, "way": way, "bytes": [2], "stored": n * k, "forward": k, "update": 0.1 * n}
        for k in (1.0, 2.0, 9.0)
        for n in (1, 100)
        for way in (SPLIT, NEAREST)
    ]
    spread = tool.over_layers(rows)
    assert [(row["merges"], row["way"]) for row in spread[:2]] == [(1, SPLIT), (1, NEAREST)]
    assert (spread[2]["stored"], spread[2]["max_stored"]) == (200.0, 900.0)
    lines = tool.render(spread).splitlines()
    assert lines[3] == "| bf16, nearest | 2 | 2.0e+00 | 2.0e+02 | 2.0e+00 | 2.0e+00 |"


# --- what is merged ------------------------------------------------------------------------------


def test_blocks_are_spread_from_the_first_to_the_last() -> None:
    names = [f"model.layers.{i}.{kind}" for i in range(12) for kind in ("q_proj", "mlp.up_proj")]
    for count, blocks in ((1, [0]), (2, [0, 11]), (3, [0, 5, 11]), (99, range(12))):
        chosen = [name for name in names if int(name.split(".")[2]) in blocks]
        assert tool.spread_over_blocks(names, count) == chosen
    assert tool.spread_over_blocks(["encoder", "decoder"], 1) == ["encoder", "decoder"]


def test_copies_take_what_the_trainer_merges() -> None:
    def shard(rows: int, cols: int, seed: int) -> FlatShard:
        return FlatShard(random(rows, cols, seed=seed).view(-1), 0, (rows, cols))

    def layer(name: str, seed: int) -> LayerShards:
        (m, n), r = SHAPE, RANK
        W, A, B = shard(m, n, seed), shard(m, r, seed + 1), shard(n, r, seed + 2)
        return LayerShards(name, 2.0, W, A, B, A, B, (), ())

    layers = [layer(f"layers.{i}", seed=10 * i) for i in range(3)]
    cpu: Any = torch.device("cpu")
    world = World(0, 1, 0, cpu, store=None)  # type: ignore[arg-type]
    merger = Merger(layers, world, IntoWeights(layers, "split"))
    rescaler = Rescaler(merger, rule="paper", eta_lipschitz=0.5, bounds=None)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(SHAPE[1], SHAPE[0]) for _ in layers)
    engine = SimpleNamespace(layer_shards=lambda gradients: layers)
    trainer = SimpleNamespace(
        engine=engine, runner=SimpleNamespace(transform=rescaler), model=model
    )
    watcher = tool.Watcher(trainer, blocks=2, merges=[2])
    assert list(watcher.layers) == ["layers.0", "layers.2"]

    before = [layer.W.local.clone().view(SHAPE) for layer in layers]
    x = random(2, 50, SHAPE[1], seed=9)
    for name in watcher.layers:
        model.get_submodule(name)(x)
    some, rules = torch.rand(4, 3, RANK, dtype=torch.float64), torch.ones(3)
    nothing = torch.ones(3, RANK)
    for alpha, beta in ((nothing, nothing), (some[0], some[1]), (nothing, nothing)):
        assert not watcher.rows
        rescaler.merge(layers, Scales(alpha, beta, rules), Clock())
    for copy, i in zip(watcher.layers.values(), (0, 2), strict=True):
        assert copy.merges == 2  # those at the start that merge nothing are not counted
        assert torch.equal(copy.start, before[i].to(torch.bfloat16).double())
        moved = layers[i].W.local.view(SHAPE) - before[i]
        assert moved.abs().max() > 0.1
        for merged in (copy.reference, copy.ways[SPLIT].value(), copy.ways[FP32].value()):
            change = (merged.double() - copy.start).float()
            torch.testing.assert_close(change, moved, rtol=0, atol=1e-5)
        assert torch.equal(copy.inputs, x.flatten(0, 1)[: tool.INPUTS])
    assert not torch.equal(layers[1].W.local.view(SHAPE), before[1])  # others are merged too
    assert {row["layer"] for row in watcher.rows} == set(watcher.layers)
    assert len(watcher.rows) == 2 * len(WAYS)


# --- the tool ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model of three blocks, and words for it to learn."""
    folder = tmp_path_factory.mktemp("tiny")
    words = {word: i for i, word in enumerate([*"abcdefgh", "<unk>", "<pad>", "</s>"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=28,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    pairs = [(a, b) for a in "abcdefgh" for b in "abcdefgh"]
    lines = [json.dumps({"prompt": f"{a} {b}", "completion": f" {b} {a}"}) for a, b in pairs]
    (folder / "data.jsonl").write_text("\n".join(lines))
    data = str(folder / "data.jsonl")
    return ["--model_name_or_path", str(folder), "--dataset", data, "--dataset_options", "{}"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | launched.ENVIRONMENT
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=env)


@pytest.mark.heavy
def test_a_run_on_a_tiny_model(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    settings = ["--rank", "3", "--blocks", "2", "--merges", "20", "1"]
    done = run(*options, *settings, "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| bf16, split | 2 + 2 |" in done.stdout
    found = json.loads(out.read_text())
    assert {"device", "versions"} <= found.keys()
    assert found["settings"]["rank"] == 3 and found["settings"]["merges"] == [20, 1]
    assert {row["layer"].split(".")[2] for row in found["layers"]} == {"0", "2"}
    assert len(found["layers"]) == 2 * 7 * 2 * len(WAYS)
    rows = {(row["merges"], row["way"]): row for row in found["over_layers"]}
    for count in (1, 20):
        assert rows[count, SPLIT]["stored"] <= 1.01 * rows[count, FP32]["stored"]
        assert rows[count, SPLIT]["forward"] <= 1.01 * rows[count, ONCE]["forward"]
        assert rows[count, NEAREST]["stored"] > 100 * rows[count, SPLIT]["stored"]


def test_mistakes_are_one_sentence(options: list[str]) -> None:
    done = run(*options, "--max_steps", "4")
    assert done.returncode == 2
    sentence = "error: only 2 rescales merged anything: set --max_steps higher"
    assert done.stderr.splitlines()[-1] == sentence
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--merges", "0"], "--merges"),
        (["--blocks", "0"], "--blocks"),
        (["--json", "/nowhere/out.json"], "--json /nowhere/out.json"),
        (["--max_stepz", "3"], "did you mean max_steps"),
        (["--ds_config", "ds_configs/zero3.json"], "leave out --ds_config"),
        (["--method", "lora"], "--method"),
    ],
)
def test_bad_options(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tool.run(["--model_name_or_path", "/nowhere", *words])
