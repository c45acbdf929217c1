"""Counted FLOPs against what a model's products add up to by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig, PreTrainedModel

from scalora_dist.config.method import MethodArguments, MethodName
from scalora_dist.config.model import ModelArguments
from scalora_dist.methods.method import AddContext
from scalora_dist.methods.registry import METHODS
from scalora_dist.modeling.load import outline
from scalora_dist.profiling.flops import _count, count_flops

LAYERS, WIDTH, INNER, WORDS, HEADS, KEYS, EACH, RANK = 3, 32, 48, 120, 4, 2, 12, 4
# (m, n) of one block's layers: q, k, v, then o, gate, up, down.
FIRST = [(HEADS * EACH, WIDTH), (KEYS * EACH, WIDTH), (KEYS * EACH, WIDTH)]
BLOCK = [*FIRST, (WIDTH, HEADS * EACH), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)]


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        head_dim=EACH,
    ).save_pretrained(tmp_path)
    return outline(ModelArguments(model_name_or_path=str(tmp_path)), torch.bfloat16)


def adapt(model: PreTrainedModel, method: MethodName) -> PreTrainedModel:
    args = MethodArguments(method=method)
    if args.reads("rank"):
        args = replace(args, rank=RANK)
    METHODS[method].add(model, AddContext(args, 0, torch.bfloat16))
    return model.to("meta")


def weights(layers: list[tuple[int, int]]) -> int:
    return sum(m * n for m, n in layers)


def test_scalora_takes_what_its_products_take(model: PreTrainedModel) -> None:
    """Two FLOPs for each weight and token; a frozen weight takes them once more going back."""
    flops = count_flops(adapt(model, "scalora"))
    base = LAYERS * weights(BLOCK) + WORDS * WIDTH
    factors = LAYERS * sum(RANK * (m + n) for m, n in BLOCK)
    # The first block's q, k and v have an input that needs no gradient, of W or through B.
    unneeded = weights(FIRST) + sum(RANK * n for _, n in FIRST)
    for examples, length in ((1, 64), (3, 100)):
        tokens = examples * length
        attention = 2 * LAYERS * HEADS * EACH * examples * 2 * length**2  # q kᵀ and p v
        forward = 2 * tokens * (base + factors) + attention
        backward = 2 * tokens * (base + 2 * factors - unneeded) + 2 * attention
        assert flops.forward(examples, length) == pytest.approx(forward, rel=1e-9)
        assert flops.backward(examples, length) == pytest.approx(backward, rel=1e-9)
        # The LM head multiplies targets alone, forward and backward.
        rest = forward + backward - 4 * (tokens - 7) * WORDS * WIDTH
        assert flops.step(examples, length, targets=7) == pytest.approx(rest, rel=1e-9)


def test_a_trained_weight_has_a_gradient_of_its_own(model: PreTrainedModel) -> None:
    flops = count_flops(adapt(model, "full"))
    base = LAYERS * weights(BLOCK) + WORDS * WIDTH
    assert flops.forward.linear == pytest.approx(2 * base, rel=1e-9)
    assert flops.backward.linear == pytest.approx(4 * base, rel=1e-9)


@pytest.mark.parametrize("method", ["scalora", "dora", "hira", "lora-xs", "mora"])
def test_other_shapes_follow_from_those_counted(model: PreTrainedModel, method: MethodName) -> None:
    """DoRA and HiRA multiply weights with each other, whatever the batch is."""
    flops = count_flops(adapt(model, method))
    assert (flops.forward.fixed > 0) == (method in ("dora", "hira"))
    for shape in ((3, 50), (2, 200)):
        forward, backward = _count(model, *shape)
        assert flops.forward(*shape) == pytest.approx(forward, rel=1e-9)
        assert flops.backward(*shape) == pytest.approx(backward, rel=1e-9)


def test_experts_are_not_counted_wrongly(tmp_path: Path) -> None:
    """torch knows no FLOPs of the product that all experts take together."""
    DeepseekV3Config(num_hidden_layers=4, hidden_size=32, vocab_size=WORDS).save_pretrained(
        tmp_path
    )
    found = outline(ModelArguments(model_name_or_path=str(tmp_path)), torch.bfloat16)
    with pytest.raises(RuntimeError, match="experts"):
        count_flops(adapt(found, "full"))
