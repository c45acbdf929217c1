"""Where low-rank layers go, how they start, and what they compute."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from scalora_dist.errors import UserError
from scalora_dist.layers.adapted_linear import LowRankLinear
from scalora_dist.layers.lora_init import lora_init
from scalora_dist.layers.target_modules import inject
from tests.support import tiny_models

SIZES = tiny_models.SIZES | {"head_dim": 8}
PROJECTIONS = {
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
}


def llama(*, tied: bool = False, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, **changes)).eval()


def gemma3() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES)).eval()


def gemma3_with_images() -> PreTrainedModel:
    """What AutoModelForCausalLM makes of Gemma-3 from 4B on."""
    vision = SIZES | {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=SIZES, vision_config=vision, mm_tokens_per_image=4)
    return AutoModelForCausalLM.from_config(config)


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))


def qwen3_moe() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=2, moe_intermediate_size=8))


def put_in(
    model: PreTrainedModel, *targets: str, rank: int = 4, scaling: float = 2.0, **changes: Any
) -> dict[str, LowRankLinear]:
    options: dict[str, Any] = {"dropout": 0.0, "seed": 0, "dtype": torch.float32} | changes
    dropout = options.pop("dropout")

    def adapt(name: str, linear: nn.Linear) -> LowRankLinear:
        a, b = lora_init(name, linear.out_features, linear.in_features, rank, **options)
        return LowRankLinear.adapt(linear, a, b, scaling=scaling, dropout=dropout)

    return inject(model, targets or ["all-linear"], rank, adapt)


def randomise(layers: dict[str, LowRankLinear]) -> None:
    generator = torch.Generator().manual_seed(7)
    for layer in layers.values():
        layer.A.data = torch.randn(layer.A.shape, generator=generator)


def logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        return model(input_ids=tokens).logits


def refusal(model: PreTrainedModel, *targets: str, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        put_in(model, *targets, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- which layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "mlp.up_proj"]])
def test_a_vision_tower_is_left_alone(targets: list[str]) -> None:
    """Text never comes through it, though its layers have the same names."""
    model = gemma3_with_images()
    assert any("vision_tower" in n and n.endswith(".q_proj") for n, _ in model.named_modules())
    layers = put_in(model, *targets)
    assert all(".language_model.layers." in name for name in layers)
    assert len(layers) == 2 * (len(PROJECTIONS) if targets == ["all-linear"] else len(targets))


@pytest.mark.parametrize(
    "build", [llama, lambda: llama(tied=True), gemma3], ids=["untied", "tied", "gemma3"]
)
def test_all_linear_is_every_projection_and_never_the_head(
    build: Callable[[], PreTrainedModel],
) -> None:
    model = build()
    layers = put_in(model)
    expected = [f"model.layers.{i}.{name}" for i in range(2) for name in PROJECTIONS]
    assert sorted(layers) == sorted(expected)
    in_model_order = [n for n, m in model.named_modules() if isinstance(m, LowRankLinear)]
    assert list(layers) == in_model_order
    assert type(model.lm_head) is nn.Linear
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{factor}" for name in layers for factor in "AB"}


def test_targets_are_suffixes_of_module_names() -> None:
    for targets, expected in [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (["model.layers.0.mlp.up_proj"], ["model.layers.0.mlp.up_proj"]),
        (
            ["up_proj", "0.self_attn.v_proj", "0.mlp.up_proj"],  # found twice, in another order
            [
                "model.layers.0.self_attn.v_proj",
                "model.layers.0.mlp.up_proj",
                "model.layers.1.mlp.up_proj",
            ],
        ),
    ]:
        assert list(put_in(llama(), *targets)) == expected


def test_a_suffix_begins_at_a_dot() -> None:
    assert "proj" in refusal(llama(), "proj")


# --- what is refused -----------------------------------------------------------------------------


def test_an_unknown_target_names_those_that_exist() -> None:
    message = refusal(llama(), "q_proj", "query")
    assert "query" in message and "lm_head" not in message
    assert all(name.rpartition(".")[2] in message for name in PROJECTIONS)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_by_name_is_refused(tied: bool) -> None:
    message = refusal(llama(tied=tied), "lm_head")
    assert "lm_head is the LM head" in message


@pytest.mark.parametrize("targets", [["c_attn"], ["c_fc", "c_proj"], []])
def test_conv1d_is_refused(targets: list[str]) -> None:
    message = refusal(gpt2(), *targets)
    assert "c_attn" in message or "c_fc" in message
    assert "Conv1D" in message and "nn.Linear" in message


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
@pytest.mark.parametrize("targets", [["experts"], []])
def test_fused_experts_are_refused(
    build: Callable[[], PreTrainedModel], targets: list[str]
) -> None:
    message = refusal(build(), *targets)
    assert "mlp.experts" in message and "3-D" in message


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
def test_attention_beside_fused_experts_can_be_adapted(build: Callable[[], Any]) -> None:
    assert len(put_in(build(), "q_proj", "o_proj")) == 4


def quantize(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.data.mul(100).to(torch.int8), requires_grad=False)


def test_quantized_weights_are_refused_by_name() -> None:
    model = llama()
    quantize(model.model.layers[1].mlp.up_proj)
    message = refusal(model, "up_proj")
    assert "model.layers.1.mlp.up_proj" in message and "int8" in message


def test_all_linear_tells_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    quantize(model.model.layers[1].mlp.up_proj)
    with caplog.at_level(logging.WARNING):
        layers = put_in(model)
    assert "model.layers.1.mlp.up_proj" not in layers and len(layers) == 13
    assert "model.layers.1.mlp.up_proj" in caplog.text


def test_a_wholly_quantized_model_is_refused() -> None:
    model = llama()
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            quantize(module)
    assert "--target_modules" in refusal(model) or "unquantized" in refusal(model)


def test_a_linear_layer_with_its_own_forward_is_refused() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = llama()
    model.model.layers[0].mlp.up_proj.__class__ = Scaled
    assert "Scaled" in refusal(model, "up_proj")


def test_what_is_no_linear_layer_is_refused() -> None:
    assert "LlamaRMSNorm" in refusal(llama(), "input_layernorm")


@pytest.mark.parametrize(("rank", "fits"), [(-1, False), (0, False), (8, True), (9, False)])
def test_the_rank_must_fit_the_smallest_layer(rank: int, fits: bool) -> None:
    if fits:  # k_proj is 8 × 16
        assert all(layer.rank == rank for layer in put_in(llama(), rank=rank).values())
    else:
        message = refusal(llama(), "k_proj", rank=rank)
        assert f"rank {rank} " in message and "between 1 and 8" in message


@pytest.mark.parametrize("targets", [["q_proj", "query"], ["lm_head"]])
def test_a_refused_model_keeps_its_layers(targets: list[str]) -> None:
    model = llama()
    refusal(model, *targets)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


# --- how they start ------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gemma3])
def test_the_models_function_is_unchanged_at_the_start(build: Callable[[], Any]) -> None:
    model = build()
    before = logits(model)
    layers = put_in(model)
    assert torch.equal(logits(model), before)
    randomise(layers)
    assert not torch.allclose(logits(model), before)


@pytest.mark.parametrize("build", [llama, lambda: llama(tied=True), gemma3])
def test_state_dict_keys_are_the_models_and_the_factors(build: Callable[[], Any]) -> None:
    model = build()
    before = model.state_dict()
    layers = put_in(model)
    after = model.state_dict()
    assert set(after) - set(before) == {f"{name}.{factor}" for name in layers for factor in "AB"}
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor)


def test_factors_depend_on_seed_and_name_alone() -> None:
    everywhere, some = put_in(llama(), seed=3), put_in(llama(), "up_proj", "q_proj", seed=3)
    other = put_in(llama(), seed=4)
    torch.manual_seed(99)
    again = put_in(llama(), seed=3)
    for name in some:
        assert torch.equal(everywhere[name].B, some[name].B)
    for name, layer in everywhere.items():
        assert torch.equal(layer.B, again[name].B)
        assert not torch.equal(layer.B, other[name].B)
    values = [tuple(layer.B.flatten().tolist()) for layer in everywhere.values()]
    assert len(set(values)) == len(values)  # no two layers start alike


def test_injection_does_not_touch_the_global_generator() -> None:
    model = llama()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    put_in(model)
    assert torch.equal(torch.rand(3), expected)


def test_b_is_uniform_within_one_over_root_n() -> None:
    m, n, r = 50, 4096, 8
    a, b = lora_init("layer", m, n, r, seed=0, dtype=torch.float32)
    assert a.shape == (m, r) and b.shape == (n, r)
    assert not a.any()
    bound = n**-0.5
    assert b.abs().max() <= bound and b.abs().max() > 0.999 * bound
    # U(±c) has mean 0 ± c/√(3·count) and standard deviation c/√3.
    assert abs(b.mean()) < 5 * bound / (3 * b.numel()) ** 0.5
    assert float(b.std()) == pytest.approx(bound / 3**0.5, rel=0.01)
    assert torch.allclose(b.norm(dim=0), torch.full((r,), 0.577), rtol=0.03)


def test_a_16_bit_start_is_the_rounded_one() -> None:
    _, single = lora_init("layer", 8, 16, 4, seed=0, dtype=torch.float32)
    a, half = lora_init("layer", 8, 16, 4, seed=0, dtype=torch.bfloat16)
    assert a.dtype == half.dtype == torch.bfloat16
    assert torch.equal(half, single.to(torch.bfloat16))


# --- what they compute ---------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_dense_weight_plus_the_update(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 31, bias=bias, dtype=torch.float64)
    a, b = torch.randn(31, 3, dtype=torch.float64), torch.randn(24, 3, dtype=torch.float64)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    dense = linear.weight.data + 1.7 * a @ b.T
    expected = x @ dense.T + (linear.bias.data if bias else 0)
    layer = LowRankLinear.adapt(linear, a, b, scaling=1.7, dropout=0.0)
    assert layer is linear and layer.rank == 3
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_factor_gradients() -> None:
    """∇A = s·G B and ∇B = s·Gᵀ A, G = ∂ℓ/∂W."""
    torch.manual_seed(0)
    s, x = 1.7, torch.randn(9, 24, dtype=torch.float64)
    a, b = torch.randn(31, 3, dtype=torch.float64), torch.randn(24, 3, dtype=torch.float64)
    linear = nn.Linear(24, 31, dtype=torch.float64).requires_grad_(False)
    layer = LowRankLinear.adapt(linear, a, b, scaling=s, dropout=0.0)
    y = layer(x)
    y.square().sum().backward()
    G = 2 * y.detach().T @ x
    assert layer.A.grad is not None and layer.B.grad is not None
    torch.testing.assert_close(layer.A.grad, s * G @ b)
    torch.testing.assert_close(layer.B.grad, s * G.T @ a)


def test_dropout_is_on_in_training_only() -> None:
    model = llama()
    layers = put_in(model, "up_proj", dropout=0.5)
    randomise(layers)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_output_has_the_bases_dtype() -> None:
    linear = nn.Linear(24, 31, dtype=torch.bfloat16)
    a, b = torch.randn(31, 3), torch.randn(24, 3)
    layer = LowRankLinear.adapt(linear, a, b, scaling=1.0, dropout=0.0)
    x = torch.randn(2, 24, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = x.double() @ (linear.weight.double() + a.double() @ b.double().T).T
    torch.testing.assert_close(y.double(), expected + linear.bias.double(), rtol=0.02, atol=0.1)


@pytest.mark.floors
@pytest.mark.parametrize("build", [llama, gemma3])
def test_output_equals_pefts(build: Callable[[], Any]) -> None:
    ours, theirs = build(), build()
    rank, lora_alpha = 4, 6
    layers = put_in(ours, rank=rank, scaling=lora_alpha / rank)
    randomise(layers)
    wrapped = get_peft_model(
        copy.deepcopy(theirs),
        LoraConfig(r=rank, lora_alpha=lora_alpha, target_modules="all-linear"),
    ).eval()
    base = wrapped.get_base_model()
    adapted = {n: m for n, m in base.named_modules() if hasattr(m, "lora_A")}
    assert set(adapted) == set(layers)
    for name, layer in layers.items():
        adapted[name].lora_B["default"].weight.data = layer.A.detach().clone()
        adapted[name].lora_A["default"].weight.data = layer.B.detach().T.clone()
    torch.testing.assert_close(logits(ours), logits(base), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(ours), logits(theirs), atol=1e-2)


def test_layers_that_share_a_weight_are_left_alone() -> None:
    """A merge into one of them would change the other's function."""
    model = llama()
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight = attention.v_proj.weight
    assert "shares its weight" in refusal(model, "k_proj")
    assert not {"k_proj", "v_proj"} & {
        name.split(".")[-1] for name in put_in(model) if ".0.self_attn" in name
    }
