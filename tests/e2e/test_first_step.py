"""Every method's start and first steps on every engine, against the formulas in float64."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from scalora_dist.config.method import MethodArguments, MethodName
from scalora_dist.engines.layer_shards import as_matrix
from scalora_dist.layers.adapted_linear import SquareLinear
from scalora_dist.methods.registry import METHODS, lora_alpha_scaling
from tests.support import first_step_reference as dense
from tests.support import runs, tiny_models
from tests.support.first_step_reference import REFERENCES, Layer, Own
from tests.support.ranks import Ranks
from tests.support.workers import first_step as work
from tests.support.workers.first_step import Found

HEAVY = pytest.mark.heavy
GetRanks = Callable[[int], Ranks]

ENGINES = {"local": 1, "zero2": 2, "zero3": 2, "fsdp": 2}  # on so many ranks
# What the run and the reference are both told. AdamW's first step is the gradient's sign, which
# amplifies rounding where it is 0: ε is of the gradients' size, so that steps are smooth in them.
TASK: dict[str, Any] = {
    "train_batch_size": 12,
    "max_length": 32,
    "max_steps": 2,
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "adam_epsilon": 0.01,
    "max_grad_norm": 0,
    "seed": 7,
    "save_model": False,
    "save_steps": 0,
    "update_rank_layers": 0,
}
# A method is told those that it reads.
OPTIONS: dict[str, Any] = {
    "rank": 3,  # a layer has 6 rows, and lora-ga takes 2r singular triples
    "lora_alpha": 6,
    "alpha_variant": "II",
    "alpha_multiplier": 1,
    "lr_ratio": 3,
    "scaling_rule": "adamw",
    "eta_lipschitz": 0.5,
    "scale_bounds": "0.05 5",
    "relora_interval": 1,
    "relora_prune": 0.5,
    "relora_warmup_steps": 1,
    "start_samples": 5,
}
OUR_NAMES = {
    "lora_B.default.weight": "A",
    "lora_A.default.weight": "B",
    "lora_magnitude_vector.default.weight": "size",
    "hira_B.default": "A",
    "hira_A.default": "B",
}
# Where W's own rounding would be seen in a step: W ⊙ A Bᵀ is small.
LARGER = {"hira": {"learning_rate": 0.3}}
OWN, START = 5e-5, 1e-6  # relative to the norm of what was added, of the effective weight
STEP, LATER = 5e-5, 3e-4  # relative to the norm of a layer's first and second update
LOSS = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_models.save_odd_model(path, "llama")
    tiny_models.save_texts(path, string.ascii_letters, longest=32, count=40)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    """The whole model in float64."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def given(method: MethodName, **others: Any) -> dict[str, Any]:
    read = {name: OPTIONS[name] for name in OPTIONS if MethodArguments(method=method).reads(name)}
    return {**TASK, **read, **LARGER.get(method, {}), **others}


def run(ranks: GetRanks, folder: Path, output: Path, engine: str, **options: Any) -> Found:
    size = ENGINES[engine]
    case = {
        "model_name_or_path": folder,
        "dataset": folder / "texts.jsonl",
        "output_dir": output / "run",
        "per_device_train_batch_size": 6 // size,  # two micro-batches a step
        **runs.engine_options(engine, output),
        **options,
    }
    found, *others = ranks(size).run(work.steps, case)
    assert all(other.losses == found.losses for other in others)
    return found


def ours(found: Found, layer: str) -> Own:
    """What was added to a layer, float64, by our names; PEFT keeps Bᵀ."""
    own = {}
    for name, value in found.added.get(layer, {}).items():
        tensor = torch.from_numpy(value).double()
        own[OUR_NAMES.get(name, name)] = tensor.T if OUR_NAMES.get(name) == "B" else tensor
    return own


def started(
    method: str, model: PreTrainedModel, found: Found, options: dict[str, Any]
) -> list[Layer]:
    """The reference's layers at the start."""
    names = [f"{layer}.weight" for layer in found.added]
    if REFERENCES[method].count is None:
        names = [name for name, _ in model.named_parameters()]
    weights = {name: model.get_parameter(name).detach() for name in names}
    G: dict[str, Tensor] = {}
    if "start_samples" in options:
        _, G = dense.gradients(model, weights, found.samples)
    layers = []
    for name, W in weights.items():
        own = ours(found, name.removesuffix(".weight"))
        W, own = REFERENCES[method].start(name, W, own, G.get(name), options)
        layers.append(Layer(name, W, own))
    return layers


def largest(errors: dict[str, float]) -> float:
    return max(errors.values())


def relative(value: np.ndarray, expected: Tensor) -> float:
    error, norm = float(np.linalg.norm(value - expected.numpy())), float(expected.norm())
    return error / norm if norm else error


def check(method: str, model: PreTrainedModel, found: Found, options: dict[str, Any]) -> None:
    """What was added, how much is trained, the weights, their updates and the losses."""
    reference = REFERENCES[method]
    layers = started(method, model, found, options)
    for layer in layers:
        for name, value in ours(found, layer.name.removesuffix(".weight")).items():
            error = relative(value.numpy(), layer.own[name])
            assert error < OWN, f"{layer.name}: {name} {error:.1e}"
    count = sum(p.numel() for p in model.parameters())
    if reference.count is not None:
        count = sum(reference.count(*as_matrix(layer.W.shape), options["rank"]) for layer in layers)
    assert found.parameters == count

    losses, seen = dense.train(reference, model, layers, found.batches, options)
    start = {name: relative(found.weights[0][name], W) for name, W in seen[0].items()}
    assert largest(start) < START, start
    tolerances = [STEP] + [LATER] * (len(losses) - 1)
    for k, tolerance in enumerate(tolerances):
        errors = {
            name: relative(
                found.weights[k + 1][name].astype(float) - found.weights[k][name],
                seen[k + 1][name] - seen[k][name],
            )
            for name in seen[0]
        }
        assert largest(errors) < tolerance, f"step {k + 1}: {errors}"
    np.testing.assert_allclose(found.losses, losses, rtol=LOSS)
    for name in found.weights[0].keys() - seen[0].keys():  # no layer of the method's
        loaded = model.get_parameter(name).detach().numpy()
        assert all(np.array_equal(weights[name], loaded) for weights in found.weights)


# At stage 2 the factors' shards end inside rows; methods that do nothing with shards are all alike.
# Every day: on all engines what is different on each, the others on two, those like others on one.
EVERYWHERE = ("scalora", "relora", "lora-pro", "lora-sb", "full")
ALIKE = ("rslora", "lora-alpha", "lora-plus", "peft-lora")


def every_day(method: str, engine: str) -> bool:
    if method in EVERYWHERE:
        return True
    return engine == "zero3" or (engine == "fsdp" and method not in ALIKE)


@pytest.mark.parametrize(
    ("method", "engine"),
    [
        pytest.param(
            *(method, engine),
            marks=[] if every_day(method, engine) else pytest.mark.heavy,
        )
        for method, engine in itertools.product(METHODS, ENGINES)
    ],
)
def test_start_and_steps_are_those_of_the_formulas(
    ranks: GetRanks,
    folder: Path,
    model: PreTrainedModel,
    tmp_path: Path,
    method: MethodName,
    engine: str,
) -> None:
    options = given(method)
    found = run(ranks, folder, tmp_path, engine, method=method, **options)
    check(method, model, found, options)


@pytest.mark.parametrize("engine", ["local", "zero3"])
def test_steps_by_the_papers_rule_are_those_of_the_formulas(
    ranks: GetRanks, folder: Path, model: PreTrainedModel, tmp_path: Path, engine: str
) -> None:
    options = given("scalora", scaling_rule="paper")
    found = run(ranks, folder, tmp_path, engine, method="scalora", **options)
    check("scalora", model, found, options)


@pytest.mark.parametrize(
    ("method", "engine"),
    [
        *(("lora-plus", engine) for engine in ENGINES),
        ("scalora", "zero3"),
        *(pytest.param("scalora", x, marks=HEAVY) for x in ENGINES if x != "zero3"),
    ],
)
def test_clipped_steps_are_those_of_the_formulas(
    ranks: GetRanks,
    folder: Path,
    model: PreTrainedModel,
    tmp_path: Path,
    method: MethodName,
    engine: str,
) -> None:
    """LoRA+ has two groups of parameters: one norm is taken over both. ScaLoRA's N is clipped."""
    options = given(method, max_grad_norm=0.05)
    found = run(ranks, folder, tmp_path, engine, method=method, **options)
    check(method, model, found, options)


@pytest.mark.parametrize(
    "engine", ["local", "zero3", *(pytest.param(x, marks=HEAVY) for x in ("zero2", "fsdp"))]
)
def test_lora_sb_starts_from_the_eta_of_its_code(
    ranks: GetRanks, folder: Path, model: PreTrainedModel, tmp_path: Path, engine: str
) -> None:
    """24 examples are 8 steps of 3. A constant schedule has no warm-up, so only R changes."""
    options = given("lora-sb", sb_eta="code", warmup_ratio=0.05)
    assert dense.lora_sb_eta(options) == pytest.approx(options["learning_rate"] / 0.4)
    found = run(ranks, folder, tmp_path, engine, method="lora-sb", **options)
    check("lora-sb", model, found, options)


def test_lora_alpha_has_two_variants_and_a_multiplier(
    ranks: GetRanks, folder: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    options = given("lora-alpha", alpha_variant="I", alpha_multiplier=0.05)
    found = run(ranks, folder, tmp_path, "local", method="lora-alpha", **options)
    check("lora-alpha", model, found, options)


@pytest.mark.parametrize("rank", [1, 8, 16])
def test_lora_alpha_is_what_the_paper_tabulates(rank: int) -> None:
    """α = 111·√r at 4096 inputs for variant II, 256·√r for variant I."""
    alphas: dict[Literal["I", "II"], float] = {"II": math.sqrt(3 * 4096), "I": 256}
    for variant, alpha in alphas.items():
        args = MethodArguments(method="lora-alpha", rank=rank, alpha_variant=variant)
        assert lora_alpha_scaling(args, 4096) * rank == pytest.approx(alpha * math.sqrt(rank))
    assert round(math.sqrt(3 * 4096)) == 111


@pytest.mark.floors
def test_pefts_lora_trains_as_ours(ranks: GetRanks, folder: Path, tmp_path: Path) -> None:
    losses = []
    methods: tuple[MethodName, ...] = ("lora", "peft-lora")
    for method in methods:
        (tmp_path / method).mkdir()
        options = given(method, max_steps=5)
        losses.append(
            run(ranks, folder, tmp_path / method, "local", method=method, **options).losses
        )
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.floors
@pytest.mark.parametrize("method", ["pissa", "lora-ga"])
def test_starts_are_pefts_own(
    ranks: GetRanks,
    folder: Path,
    model: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: MethodName,
) -> None:
    """On whole matrices, each column up to its sign, which an SVD leaves open."""
    # PEFT takes the gradient's singular vectors from a random sketch: up to 2e-3 off.
    monkeypatch.setattr(torch, "svd_lowrank", lambda matrix, q, niter: dense.svd(matrix.double()))
    options = given(method, max_steps=1)
    found = run(ranks, folder, tmp_path, "zero3", method=method, **options)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in found.added}
    _, G = dense.gradients(model, weights, found.samples)
    for name in found.added:
        plain.get_submodule(name)._peft_loraga_grad = G[f"{name}.weight"].float()
    start: Any = method.replace("-", "_")  # PEFT's own type leaves lora_ga out
    config = peft.LoraConfig(
        r=options["rank"],
        lora_alpha=options["lora_alpha"],
        target_modules=list(found.added),
        init_lora_weights=start,
        lora_ga_config=peft.LoraGAConfig() if method == "lora-ga" else None,
    )
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config, plain)
    for name in found.added:
        own, layer = ours(found, name), plain.get_submodule(name)
        theirs = {
            "A": layer.lora_B["default"].weight.detach().double(),
            "B": layer.lora_A["default"].weight.detach().double().T,
        }
        for factor, columns in theirs.items():
            sign = dense.alike(columns, own[factor])
            error = relative(own[factor].numpy(), columns * sign)
            assert error < OWN, f"{name}: {factor}"


@pytest.mark.parametrize("size", [2, 3])
def test_lora_pro_is_the_projection_of_full_fine_tuning(ranks: GetRanks, size: int) -> None:
    """Where A ≠ 0, cut inside rows: the dense minimiser, and what it minimises."""
    generator = torch.Generator().manual_seed(0)
    rank, scaling = 4, 1.5
    given, expected, projected = [], [], []
    for m, n in ((35, 37), (6, 35), (37, 5), (4, 9)):
        A, B, G = (
            torch.randn(shape, generator=generator) for shape in ((m, rank), (n, rank), (m, n))
        )
        given.append((A, B, scaling * G @ B, scaling * G.T @ A))
        A, B, G = A.double(), B.double(), G.double()
        expected.append(dense.lora_pro(A, B, G, scaling))
        rest_A, rest_B = (torch.eye(len(F)).double() - F @ torch.linalg.pinv(F) for F in (A, B))
        projected.append(G - rest_A @ G @ rest_B)  # onto all s(dA Bᵀ + A dBᵀ)
    for found in ranks(size).run(work.lora_pro, given, scaling):
        for (A, B, *_), ours, theirs, step in zip(given, found, expected, projected, strict=True):
            dA, dB = (part.double() for part in ours)
            moved = scaling * (dA @ B.double().T + A.double() @ dB.T)
            assert relative(moved.numpy(), step) < 1e-5
            assert relative(dA.numpy(), theirs[0]) < 1e-5
            assert relative(dB.numpy(), theirs[1]) < 1e-5


@pytest.mark.parametrize("shape", [(35, 37), (6, 35), (70, 5), (5, 70), (64, 8), (3, 2)])
def test_mora_is_the_papers_at_any_shape(shape: tuple[int, int]) -> None:
    """Outputs cut off and repeated, inputs filled up; whole pieces, one and a half, many."""
    m, n = shape
    for rank in (1, 2):
        linear = torch.nn.Linear(n, m, bias=False, dtype=torch.float64)
        layer = SquareLinear.adapt(linear, rank, scaling=1.0, dropout=0.0, dtype=torch.float64)
        side = dense.mora_side(m, n, rank)
        assert layer.M.shape == (side, side)
        torch.nn.init.normal_(layer.M)
        x = torch.randn(4, 3, n, dtype=torch.float64)
        expected = dense.mora_outputs(x.view(12, n), layer.M, m).view(4, 3, m)
        torch.testing.assert_close(layer.update(x), expected)
        update = torch.zeros(m, n, dtype=torch.float64)
        layer.merge_(update, {"M": layer.M.detach()})
        torch.testing.assert_close(x @ update.T, expected)
