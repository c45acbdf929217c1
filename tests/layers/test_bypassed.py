"""Layers whose weight a model multiplies itself are found, and no others."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from scalora_dist.errors import UserError
from scalora_dist.layers.target_modules import inject
from tests.support import tiny_models

SIZES = tiny_models.SIZES | {"pad_token_id": 0}
LLAMA = SIZES | {"head_dim": 8}
MAMBA = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
# Two heads of 16 channels, which is twice the hidden size.
MIXER = {"num_heads": 2, "head_dim": 16, "n_groups": 1, "chunk_size": 4, "state_size": 4}
HYBRID = {
    **{"mamba_n_heads": 2, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 4},
    "mamba_chunk_size": 4,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}

# {family: (its sizes, what is left out of its first block)}
FAMILIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "mamba": (MAMBA, {"mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"}),
    "falcon_mamba": (MAMBA, {"mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"}),
    "mamba2": (MAMBA | MIXER, {"mixer.out_proj"}),
    "bamba": (LLAMA | HYBRID | {"attn_layer_indices": [1]}, {"mamba.out_proj"}),
    "falcon_h1": (LLAMA | HYBRID | {"mamba_d_ssm": 32}, {"mamba.out_proj"}),
    "granitemoehybrid": (
        SIZES | HYBRID | {"layer_types": ["mamba", "attention"], "num_local_experts": 0},
        {"mamba.out_proj"},
    ),
    "jamba": (
        SIZES
        | {"num_experts": 1, "mamba_d_state": 4, "attn_layer_period": 2}
        # The second layer has attention.
        | {"attn_layer_offset": 1, "expert_layer_period": 9, "expert_layer_offset": 8},
        {"mamba.dt_proj"},
    ),
    "gemma3n_text": (
        LLAMA
        | {"vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 4, "laurel_rank": 4}
        | {"layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 0}
        | {"activation_sparsity_pattern": [0.0] * 2, "altup_num_inputs": 2},
        {"altup.correction_coefs"},
    ),
    "llama": (LLAMA, set()),
    "gemma3_text": (LLAMA, set()),
    # Its code multiplies parts of two weights, if pretraining_tp is more than 1.
    "bloom": ({"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2}, set()),
    "opt": (SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 8}, set()),
    "recurrent_gemma": (SIZES | {"lru_width": 16, "attention_window_size": 8}, set()),
}
# {family: (its sizes, four layers to adapt)}
MIXTURES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "qwen3_moe": (LLAMA | EXPERTS, ["q_proj", "o_proj"]),
    "mixtral": (LLAMA | {"num_local_experts": 4}, ["q_proj", "o_proj"]),
    "gpt_oss": (
        LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
        ["q_proj", "o_proj"],
    ),
    # Its experts' output has another width than their input.
    "jetmoe": (SIZES | {"kv_channels": 8, "num_local_experts": 4}, ["router.layer"]),
}


def make(family: str, sizes: dict[str, Any]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))


def adapted(model: PreTrainedModel, *targets: str) -> list[str]:
    """The names of the layers that would be adapted."""
    return list(inject(model, targets or ["all-linear"], 1, lambda _, linear: linear))


def left_out(model: PreTrainedModel) -> set[str]:
    """The names of the linear layers that ``all-linear`` leaves out, besides the head."""
    linear = {n for n, x in model.named_modules() if type(x) is nn.Linear}
    head = {n for n, x in model.named_modules() if x is model.get_output_embeddings()}
    return linear - head - set(adapted(model))


def in_first_block(names: set[str]) -> set[str]:
    return {name.partition(".layers.0.")[2] for name in names if ".layers.0." in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_leaves_out_its_own(family: str, caplog: pytest.LogCaptureFixture) -> None:
    sizes, expected = FAMILIES[family]
    model = make(family, sizes)
    with caplog.at_level(logging.INFO):
        found = left_out(model)
    assert in_first_block(found) == expected
    warned = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    assert len([line for line in warned if "leaves out" in line]) == bool(expected)
    assert all(name in "".join(warned) for name in found)
    assert "on the CPU fails" not in caplog.text
    for name in expected:
        with pytest.raises(UserError, match=r"multiply the weight .*: leave it out$"):
            adapted(model, name)


@pytest.mark.parametrize("family", MIXTURES)
def test_layers_beside_fused_experts_are_adapted(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    sizes, targets = MIXTURES[family]
    with caplog.at_level(logging.INFO):
        assert len(adapted(make(family, sizes), *targets)) == 4
    assert not caplog.records


def test_a_router_before_fused_experts_is_found() -> None:
    """Its weight has a part in nothing but the experts' weights."""
    sizes = {
        k: v for k, v in SIZES.items() if k not in ("num_hidden_layers", "num_key_value_heads")
    }
    ranks = {"q_lora_rank": 4, "kv_lora_rank": 4, "num_layers": 1, "head_dim": 4}
    heads = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    experts = {"n_routed_experts": 2, "zero_expert_num": 1, "moe_topk": 1}
    widths = {"ffn_hidden_size": 16, "expert_ffn_hidden_size": 8}
    model = make("longcat_flash", sizes | ranks | heads | experts | widths)
    with pytest.raises(UserError, match=r"router\.classifier is bypassed"):
        adapted(model, "router.classifier")
    assert adapted(model, "o_proj")


# --- models of our own ---------------------------------------------------------------------------


class Experts(nn.Module):
    """Sends every token to the first of its experts."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.gate = nn.Linear(width, 2, bias=False)
        self.single = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.deep = nn.ModuleList(nn.Sequential(nn.Linear(width, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y, expert = self.gate(x).softmax(-1)[..., :1] * x, int(x.isnan().any())
        return y + self.single[expert](x) + self.deep[expert](x)


class Joined(nn.Module):
    """Multiplies x by two weights at once, and by a third one in a function of its own."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.left, self.right, self.third, self.called = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left.weight, self.right.weight
        y = F.linear(x, torch.cat([left, right]))[..., : x.shape[-1]]
        return self.called(y.to(self.called.weight.dtype)) + times(x, self)


def times(x: Tensor, module: Joined) -> Tensor:
    return x @ module.third.weight.t()


class Twice(nn.Module):
    """Calls a layer, and uses its weight for something else too."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.called = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.called.weight
        return self.called(x) * weight.norm()


class OnGPU(nn.Module):
    """Gives a weight to a kernel that no CPU has."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.given, self.called = (nn.Linear(config.hidden_size, config.hidden_size) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.called.weight, Tensor)
        return kernel(self.called(x), out=self.given.weight)


def kernel(x: Tensor, out: Tensor) -> Tensor:
    raise RuntimeError("no GPU")


def with_mlp(kind: type[nn.Module]) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    for block in model.model.layers:
        block.mlp = kind(model.config)
    return model


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Experts, set()),
        (Joined, {"mlp.left", "mlp.right", "mlp.third"}),
        (Twice, {"mlp.called"}),
        (OnGPU, {"mlp.given"}),
    ],
)
def test_it_is_the_use_of_the_weight_that_counts(
    kind: type[nn.Module], expected: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert in_first_block(left_out(with_mlp(kind))) == expected
    assert ("no GPU" in caplog.text) == (kind is OnGPU)


@pytest.mark.parametrize("kind", [Experts, Joined, Twice])
def test_a_backward_agrees(kind: type[nn.Module]) -> None:
    """Of what is adapted, no weight gets a gradient that A and B would not have part in."""
    model = with_mlp(kind)
    names = adapted(model)
    layers = [model.get_submodule(name) for name in names]
    for layer in layers:
        layer.weight.requires_grad_(True)

        def without_weight(_: nn.Module, given: tuple[Tensor], out: Tensor) -> Tensor:
            return given[0].sum() + out.detach()

        layer.register_forward_hook(without_weight)
    model.get_input_embeddings().weight.requires_grad_(True)
    model(input_ids=torch.arange(6)[None]).logits.sum().backward()
    assert names and all(layer.weight.grad is None for layer in layers)


# --- the same in every state of the model --------------------------------------------------------


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """As ranks without weights have it."""
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config)


def for_flash(config: PreTrainedConfig) -> PreTrainedModel:
    """Set to an attention that does not run here."""
    model = AutoModelForCausalLM.from_config(config)
    model.config._attn_implementation = "flash_attention_2"
    return model


def in_half(config: PreTrainedConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, dtype=torch.float16)


@pytest.mark.parametrize("build", [on_meta, for_flash, in_half])
@pytest.mark.parametrize("training", [True, False])
def test_any_rank_finds_the_same(
    build: Callable[[PreTrainedConfig], PreTrainedModel],
    training: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for family in ("falcon_h1", "gemma3n_text"):
        sizes, expected = FAMILIES[family]
        model = build(AutoConfig.for_model(family, **sizes)).train(training)
        with caplog.at_level(logging.INFO):
            assert in_first_block(left_out(model)) == expected
    assert "on the CPU fails" not in caplog.text


def test_the_model_is_as_before() -> None:
    model = make("bamba", FAMILIES["bamba"][0]).eval()
    model.model.layers[0].train()
    model.requires_grad_(False)

    def state() -> tuple[Any, ...]:
        modules = [(n, id(x), type(x), x.training) for n, x in model.named_modules()]
        tensors = [(n, id(x)) for n, x in [*model.named_parameters(), *model.named_buffers()]]
        return (
            modules,
            tensors,
            copy.deepcopy(model.config.to_dict()),
            torch.get_rng_state().tolist(),
        )

    values = {name: x.clone() for name, x in model.state_dict().items()}
    before = state()
    chosen = model.config._attn_implementation, model.config._experts_implementation
    adapted(model)
    assert state() == before
    assert chosen == (model.config._attn_implementation, model.config._experts_implementation)
    assert all(torch.equal(x, values[name]) for name, x in model.state_dict().items())
