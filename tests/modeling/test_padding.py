"""Which models need an attention mask, and that the others give the same without one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from scalora_dist.data.collate import batch_of
from scalora_dist.data.micro_batch import MicroBatch
from scalora_dist.data.prompts import IGNORE
from scalora_dist.modeling import loss
from scalora_dist.modeling.loss import TargetLoss
from scalora_dist.modeling.padding import needs_mask, whole_rows
from tests.support import families, stub_flash
from tests.support.host_reads import HostReads

VOCABULARY, LENGTHS = 97, (19, 6, 13)  # longer and shorter than Gemma-3's window of 8
# Recurrent layers and convolutions; and Bloom, whose attention does not say that it is causal.
KEPT = {"bloom", "mamba", "jamba", "minimax", "nemotron_h", "qwen3_5_text", "lfm2"}


def a_batch(*, masked: bool) -> MicroBatch:
    """Examples of different lengths; about a third of their tokens are no targets."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, VOCABULARY - 1, (n,), generator=generator) for n in LENGTHS]
    ids = pad_sequence(rows, batch_first=True)
    labels = pad_sequence(rows, batch_first=True, padding_value=IGNORE)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return batch_of(ids, labels.masked_fill(ids % 3 == 0, IGNORE), mask if masked else None)


def loss_and_gradients(
    model: PreTrainedModel, batch: MicroBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    found = TargetLoss(model)(model, batch).loss
    found.backward()
    named = model.named_parameters()
    return found.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.floors
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_model_without_mask_has_the_same_loss_and_gradients(family: str) -> None:
    model = families.build(family, VOCABULARY).float().eval()
    for p in model.parameters():
        if p.dim() > 1:  # large enough for attention to matter
            torch.nn.init.normal_(p, std=0.3)
    assert needs_mask(model) == (family in KEPT)
    expected, gradients = loss_and_gradients(model, a_batch(masked=True))
    found, others = loss_and_gradients(model, a_batch(masked=False))
    assert expected > 10 and gradients.keys() == others.keys()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        close = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(others[name], gradient, rtol=0, atol=close, msg=name)


def test_a_decoder_whose_tokens_see_later_ones_keeps_its_mask() -> None:
    """And it has another loss without."""
    sizes = families.SIZES | {"vocab_size": VOCABULARY, "query_pre_attn_scalar": 8}
    config = AutoConfig.for_model("gemma3_text", **sizes, use_bidirectional_attention=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert needs_mask(model)
    one, other = (loss_and_gradients(model, a_batch(masked=m))[0] for m in (True, False))
    assert abs(one - other) > 1e-4 * one


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "t5", "modernbert"])
def test_encoders_keep_their_masks(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        assert needs_mask(AutoModelForSequenceClassification.from_config(config))


def test_a_model_with_code_of_its_own_keeps_its_mask() -> None:
    model = families.build("llama", VOCABULARY)
    model.model.__class__ = type("Own", (type(model.model),), {"__module__": "modeling_own"})
    assert needs_mask(model)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_the_host_reads_nothing_in_a_forward_and_backward(family: str) -> None:
    module = families.build(family, VOCABULARY)
    chunked, batch = TargetLoss(module), a_batch(masked=False)
    chunked(module, batch)  # the first reads the mark
    with HostReads() as reads:
        chunked(module, batch).loss.backward()
    assert reads.found == []


def test_a_hybrid_whose_config_names_only_attention_keeps_its_mask() -> None:
    config = AutoConfig.for_model("lfm2", **families.SIZES, layer_types=["full_attention"] * 2)
    assert needs_mask(AutoModelForCausalLM.from_config(config))


def test_with_flash_attention_transformers_reads_positions_in_each_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If it no longer does, ``whole_rows`` replaces too much."""
    module = families.build("llama", VOCABULARY)
    stub_flash.use(module, monkeypatch)
    chunked = TargetLoss(module)
    ids = torch.arange(2, 12).view(1, 10)
    batch = batch_of(ids, ids)
    chunked(module, batch)
    for context, layers in ((whole_rows, 0), (nullcontext, 2)):
        monkeypatch.setattr(loss, "whole_rows", context)
        with HostReads() as reads:
            chunked(module, batch)
        assert len(reads.found) == (layers + 1 if layers else 0)  # and once for the mask


def test_transformers_reads_positions_to_find_several_sequences_in_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If it no longer does, ``whole_rows`` is not needed."""
    module = families.build("llama", VOCABULARY)
    chunked, batch = TargetLoss(module), a_batch(masked=False)
    chunked(module, batch)
    monkeypatch.setattr(loss, "whole_rows", nullcontext)
    with HostReads() as reads:
        chunked(module, batch)
    assert len(reads.found) == 1
