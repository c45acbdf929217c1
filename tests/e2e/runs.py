"""Whole training runs on real ranks, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from scalora_dist.config import parse_options
from scalora_dist.engines.pick import pick_engine
from scalora_dist.trainer import Trainer, hidden_size
from scalora_dist.world import World

REPOSITORY = Path(__file__).parents[2]


def words(options: dict[str, Any]) -> list[str]:
    """Options as a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]


def make(world: World, options: dict[str, Any], trainer: type[Trainer] = Trainer) -> Trainer:
    """What launch/train.py makes after the launcher, on ranks that are there already."""
    parsed = parse_options(words(options))
    parsed.train.settle_batch(world.size)
    return trainer(parsed, world, pick_engine(parsed, world, hidden_size(parsed.model)))


def run(world: World, options: dict[str, Any]) -> dict[str, Any]:
    return make(world, options).run()


def training_modes(world: World, options: dict[str, Any]) -> list[bool]:
    """Whether all of the model was in training mode, step by step."""
    seen: list[bool] = []

    class Watched(Trainer):
        def _step(self, *args: Any) -> dict[str, Any]:
            seen.append(all(module.training for module in self.model.modules()))
            return super()._step(*args)

    make(world, options, Watched).run()
    return seen


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def ds_config(stage: str) -> str:
    return str(REPOSITORY / "ds_configs" / f"{stage}.json")


def save_tiny_llama(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Two layers whose row lengths divide by nothing, tied embeddings, random weights."""
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
    """A tiny random DeepSeek-V3, and its persistent buffers, {name: tensor}."""
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
