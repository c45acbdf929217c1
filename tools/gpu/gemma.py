"""Gemma-3-12B's shapes: its config, random layers without a model, and a random model."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, Gemma3ForCausalLM, Gemma3TextConfig

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.planning.arguments import SHIPPED
from tools.loss_compare import byte_tokenizer

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FIVE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # the papers' choice
SCALING = 2.0

# The smoke form's sizes: a CPU runs each part in seconds.
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
}


def text_config(*, smoke: bool, blocks: int | None = None) -> Gemma3TextConfig:
    """The config of Gemma-3-12B's language model, or of a tiny one.

    Args:
        smoke: whether to shrink it to ``SMALL``.
        blocks: number of decoder blocks; None: as in the config.
    """
    config = AutoConfig.from_pretrained(SHIPPED / "google/gemma-3-12b-pt").get_text_config()
    sizes = dict(SMALL if smoke else {}, tie_word_embeddings=True)
    given = {k: v for k, v in config.to_dict().items() if k not in ("layer_types", "architectures")}
    if blocks:
        sizes["num_hidden_layers"] = blocks
    return Gemma3TextConfig(**given | sizes)


def projection_shapes(config: Gemma3TextConfig) -> dict[str, tuple[int, int]]:
    """{projection: (m, n) of its weight} in a decoder block."""
    one = copy.deepcopy(config)
    one.num_hidden_layers = 1
    one.layer_types = config.layer_types[:1]
    with init_empty_weights():
        model = Gemma3ForCausalLM(one)
    linear = {n.split(".")[-1]: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: (linear[name].out_features, linear[name].in_features) for name in SEVEN}


def random_layers(
    weights: Iterable[Tensor], rank: int, generator: torch.Generator
) -> Iterator[LayerShards]:
    """Layers on one rank, as an engine shows them before a rescale: full, with random factors.

    Args:
        weights: the layers' W (m, n), on the generator's device.
        rank: r.
    """
    device = generator.device

    def draw(rows: int, size: float) -> Tensor:
        return size * torch.randn(rows, rank, generator=generator, device=device)

    for i, weight in enumerate(weights):
        m, n = weight.shape
        yield LayerShards(
            name=f"layer{i}",
            scaling=SCALING,
            W=shard_of(weight),
            A=shard_of(draw(m, 0.02)),
            B=shard_of(draw(n, 0.02)),
            grad_A=shard_of(draw(m, 1e-3)),
            grad_B=shard_of(draw(n, 1e-3)),
            moments_A=(shard_of(draw(m, 1e-3)), shard_of(draw(m, 1e-3).square())),
            moments_B=(shard_of(draw(n, 1e-3)), shard_of(draw(n, 1e-3).square())),
        )


def shard_of(matrix: Tensor) -> FlatShard:
    """All of a matrix, on one rank."""
    return FlatShard(matrix.view(-1), 0, (matrix.shape[0], matrix.shape[1]))


def save_config(folder: Path, config: Gemma3TextConfig) -> None:
    """Write the config and a byte tokenizer: all that a plan reads."""
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def save_weights(folder: Path, config: Gemma3TextConfig, device: torch.device) -> None:
    """Write random bfloat16 weights, drawn on ``device``. Keeps no memory of it."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = Gemma3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    del model
    gc.collect()
    if device.type == "cuda":  # other processes train on it while this one waits
        torch.cuda.empty_cache()
