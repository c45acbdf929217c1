"""Saves tiny random models, tokenizers and texts in the file formats of users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from tools.loss_compare import ODD_SIZES, byte_tokenizer, save_odd_model, save_texts

__all__ = [
    "ODD_SIZES",
    "SIZES",
    "byte_tokenizer",
    "save_odd_model",
    "save_task",
    "save_texts",
    "save_tiny_deepseek",
    "save_tiny_llama",
    "save_tiny_mamba",
]


# Of a decoder of any family, for tests that need no tokenizer.
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def save_tiny_llama(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A random Llama with two layers, tied embeddings, and row lengths that are hard to divide."""
    import torch

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=28,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_tiny_deepseek(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Save a tiny random DeepSeek-V3. Returns its persistent buffers, {name: tensor}."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=1,
    )
    model = DeepseekV3ForCausalLM(config)
    buffers = {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    for buffer in buffers.values():
        torch.nn.init.normal_(buffer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return buffers


def save_tiny_mamba(folder: Path) -> None:
    """Save a tiny random Mamba, its tokenizer and texts."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = MambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        state_size=4,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    MambaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_texts(folder, "abc ", longest=24, count=41)


def save_task(folder: Path, **sizes: Any) -> Path:
    """Save a tiny model and texts in one folder; ``sizes`` as for ``save_odd_model``."""
    save_odd_model(folder, "llama", **sizes)
    save_texts(folder, "abc ", longest=24, count=41)
    return folder
