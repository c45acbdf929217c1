"""Tiny random models of many families, whose tensors have other names in files than in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)

from tests.support import tiny_models

# The same sizes in the words of all families.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "n_group", "n_groups", "topk_group"), 1),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads"), 2),
    "head_dim": 8,
    "first_k_dense_replace": 1,
    "mamba_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
NEEDS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"q_lora_rank": None, "num_key_value_heads": 2},
    "gptj": {"rotary_dim": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "olmo": {"clip_qkv": 1.0},  # changes q, k and v in place
    "nemotron_h": {"layers_block_type": ["mamba", "moe"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
}
PLAIN = (
    *("llama", "gpt2", "gptj", "opt", "bloom", "stablelm", "phi3", "gemma2", "gpt_oss", "mamba"),
    "olmo",
)
CONVERTED = (
    *("gpt_neox", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "jamba", "minimax"),
    *("deepseek_v3", "ernie4_5_moe", "glm4_moe", "nemotron_h", "phimoe", "qwen3_5_text", "lfm2"),
)
FAMILIES = ("tied", "gemma3", *PLAIN, *CONVERTED)


def build(family: str, vocabulary: int) -> PreTrainedModel:
    """A random model. ``tied`` is a Llama whose head is its embedding; ``gemma3`` has an eye."""
    torch.manual_seed(0)
    if family == "gemma3":
        return Gemma3ForConditionalGeneration(_seeing(vocabulary))
    kind = "llama" if family == "tied" else family
    sizes = SIZES | {"vocab_size": vocabulary} | NEEDS.get(family, {})
    if family != "gemma2":
        sizes["tie_word_embeddings"] = family == "tied"
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))


def _seeing(vocabulary: int) -> Gemma3Config:
    text = SIZES | {"vocab_size": vocabulary, "query_pre_attn_scalar": 8, "sliding_window": 8}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    vision = {"hidden_size": 12, "intermediate_size": 14, "image_size": 8, "patch_size": 2}
    return Gemma3Config(
        text_config=text,
        vision_config=vision | {"num_hidden_layers": 1, "num_attention_heads": 2},
        mm_tokens_per_image=4,
        image_token_index=vocabulary - 1,
    )


def save(family: str, folder: Path) -> Path:
    """Save a random model with its tokenizer, and texts in ``folder/texts.jsonl``."""
    tokenizer = tiny_models.byte_tokenizer()
    model = build(family, len(tokenizer))
    for name, tensor in model.state_dict().items():
        if "correction_bias" in name:  # zero in a new model
            torch.nn.init.normal_(tensor)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tiny_models.save_texts(folder, "abc ", longest=24, count=41)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in the safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: x for file in files for name, x in load_file(file).items()}
