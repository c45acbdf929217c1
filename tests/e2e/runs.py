"""Whole training runs on real ranks, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from scalora_dist.config.parser import parse_options
from scalora_dist.core.scale_solver import Rule, quadratic
from scalora_dist.distributed.world import World
from scalora_dist.engines.build import engine_factory
from scalora_dist.methods.scalora import Rescaler
from scalora_dist.modeling.load import read_base_model
from scalora_dist.training.trainer import Trainer

REPOSITORY = Path(__file__).parents[2]


def words(options: dict[str, Any]) -> list[str]:
    """Options as a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]


def make(world: World, options: dict[str, Any], trainer: type[Trainer] = Trainer) -> Trainer:
    """What launch/train.py makes after the launcher, on ranks that are there already."""
    parsed = parse_options(words(options))
    parsed.train.settle_batch(world.size)
    base = read_base_model(parsed.model, parsed.train.dtype, world.device)
    return trainer(parsed, world, base, engine_factory(parsed, world, base))


def run(world: World, options: dict[str, Any]) -> dict[str, Any]:
    return make(world, options).run()


def training_modes(world: World, options: dict[str, Any]) -> list[bool]:
    """Whether all of the model was in training mode, step by step."""
    seen: list[bool] = []

    class Watched(Trainer):
        def _step(self, *args: Any) -> Any:
            seen.append(all(module.training for module in self.model.modules()))
            return super()._step(*args)

    make(world, options, Watched).run()
    return seen


def rules_taken(world: World, options: dict[str, Any]) -> list[dict[str, tuple[str, float]]]:
    """Train; for each step {layer: (its rule, how far its column solution is from a bound)}."""
    trainer = make(world, options)
    rescaler, seen = trainer.method.transform, []
    assert isinstance(rescaler, Rescaler)
    solve, bounds = rescaler.solve, rescaler.bounds
    assert bounds is not None

    def note(layers: Any, gram_a: Tensor, gram_b: Tensor) -> Any:
        scales = solve(layers, gram_a, gram_b)
        rules = [Rule(code).name.lower() for code in scales.rule.tolist()]
        names = [layer.name for layer in layers]
        far = distances(gram_a, gram_b, bounds)
        seen.append(dict(zip(names, zip(rules, far, strict=True), strict=True)))
        return scales

    rescaler.solve = note  # type: ignore[method-assign]
    trainer.run()
    return seen


def distances(gram_a: Tensor, gram_b: Tensor, bounds: tuple[float, float]) -> list[float]:
    """Per layer: what relative change of the grams would change whether z = H⁺λ is in the box.

    To first order, entry by entry: x = C⁺c moves by at most |C⁺|(|c| + |C||x|) times that change,
    x and C being z and H in the units where H has a unit diagonal. Negative: z is outside.
    """
    found = []
    H, lam = (part.numpy() for part in quadratic(gram_a, gram_b))
    rank = gram_a.shape[-1] // 2
    for i in range(len(H)):
        squares = np.concatenate([np.diag(gram.numpy())[:rank] for gram in (gram_a[i], gram_b[i])])
        used = np.diag(H[i]) > 0  # a side without a gradient is free
        unit = np.sqrt(np.diag(H[i])[used])
        C, c = H[i][np.ix_(used, used)] / np.outer(unit, unit), lam[i][used] / unit
        lower, upper = (bound**2 * unit / squares[used] for bound in bounds)
        inverse = np.linalg.inv(C)
        x = inverse @ c
        moves = np.abs(inverse) @ (np.abs(c) + np.abs(C) @ np.abs(x))
        found.append(float((np.minimum(x - lower, upper - x) / moves).min()))
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def ds_config(stage: str) -> str:
    return str(REPOSITORY / "ds_configs" / f"{stage}.json")


FSDP_CONFIGS: dict[str, dict[str, Any]] = {
    "fsdp_offload": {"cpu_offload": True},
    "hybrid": {"mesh_shape": [2, 2]},
}


def engine_options(engine: str, folder: Path) -> dict[str, Any]:
    """Options for "local" (none), a config of ds_configs/, "fsdp" or one of FSDP_CONFIGS.

    Args:
        folder: where an FSDP config may be written.
    """
    if engine == "local":
        return {}
    if engine == "fsdp":
        return {"fsdp": True}
    if engine in FSDP_CONFIGS:
        path = folder / f"{engine}.json"
        path.write_text(json.dumps(FSDP_CONFIGS[engine]))
        return {"fsdp": True, "fsdp_config": path}
    return {"ds_config": ds_config(engine)}


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


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte: with the demo model's 49152, the LM head would be all of a tiny model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


# Rows that neither 2, 3 nor 4 divides (35, 37, and a vocabulary of 259), fewer rows than 4 ranks
# can share (6), and weights large enough for attention to matter.
ODD_SIZES = {
    "vocab_size": 259,
    "hidden_size": 35,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def save_odd_model(folder: Path, architecture: str, **sizes: Any) -> None:
    """A tiny random "llama" or "gemma3" whose rows divide by nothing, with a byte tokenizer.

    Args:
        sizes: others than ``ODD_SIZES``.
    """
    import torch

    torch.manual_seed(0)
    if architecture == "gemma3":
        config = Gemma3TextConfig(
            **ODD_SIZES | sizes,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=5,
            query_pre_attn_scalar=6,
            tie_word_embeddings=True,
        )
        model = Gemma3ForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**ODD_SIZES | sizes, tie_word_embeddings=False))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def save_texts(folder: Path, letters: str, *, longest: int, count: int) -> None:
    """texts.jsonl: random texts of these letters, from 8 letters to fewer than ``longest``."""
    generator, choices = np.random.default_rng(0), np.array(list(letters))
    with open(folder / "texts.jsonl", "w") as file:
        for length in generator.integers(8, longest, count):
            file.write(json.dumps({"text": "".join(generator.choice(choices, length))}) + "\n")


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
