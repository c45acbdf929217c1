"""The loss in chunks against the one of whole logits."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from scalora_dist.data.collate import batch_of
from scalora_dist.data.micro_batch import MicroBatch
from scalora_dist.data.prompts import IGNORE
from scalora_dist.distributed.world import World
from scalora_dist.modeling import loss
from scalora_dist.modeling.loss import LossHead, TargetLoss, Targets, target_losses
from scalora_dist.profiling.live import LiveBytes
from tests.support import runs, tiny_runs
from tests.support.host_reads import HostReads

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "tied": Gemma3TextConfig(**SIZES, tie_word_embeddings=True),
    "projected": OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=12, dropout=0.0),
    "neox": GPTNeoXConfig(**SIZES),
    "softcapped": Gemma2Config(**SIZES, final_logit_softcapping=5.0),
}


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]).float()


def a_batch(*, targets: bool = True) -> MicroBatch:
    """Targets here and there, and an example that has none; or no targets at all."""
    ids = torch.randint(1, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(ids % 3 == 0, IGNORE)
    labels[1 if targets else slice(None)] = IGNORE
    return batch_of(ids, labels, torch.ones_like(ids))


def plain(model: PreTrainedModel, batch: MicroBatch) -> Targets:
    return target_losses(model(**batch.inputs).logits, batch)


@pytest.mark.floors
@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize("kind", CONFIGS)
def test_chunks_give_what_whole_logits_give(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK", rows * 97)
    model, batch = model_of(kind), a_batch()
    other = copy.deepcopy(model)
    expected = plain(other, batch)
    (0.37 * expected.loss).backward()
    chunked = TargetLoss(model)
    found = chunked(model, batch)
    (0.37 * found.loss).backward()
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    assert found.loss > 10 and found.right is None
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=name)
    with torch.no_grad():
        expected, found = plain(other, batch), chunked(model, batch)
    assert found.right is not None and expected.right is not None
    assert torch.equal(found.right, expected.right)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    # Whoever asks for logits gets them still.
    assert torch.equal(model(batch.input_ids).logits, other(batch.input_ids).logits)


def test_a_model_that_changes_its_logits_is_found_out_without_targets_too() -> None:
    model, batch = model_of("softcapped"), a_batch(targets=False)
    chunked = TargetLoss(model)
    with tiny_runs.warnings_of() as heard:
        found = chunked(model, batch)
    assert float(found.loss) == 0 and chunked.head is None
    assert len(heard) == 1 and "kept whole" in heard[0]


class Fused(nn.Module):
    """In place of liger_kernel's, which needs a GPU: the same call, and no empty batch."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        assert reduction == "sum"

    def forward(self, weight: Tensor, hidden: Tensor, wanted: Tensor, bias: Any) -> Tensor:
        assert len(hidden) == len(wanted) > 0
        with HostReads() as reads:
            assert (wanted != IGNORE).sum().item() == len(wanted)
        assert reads.found == []
        return nn.functional.cross_entropy(
            nn.functional.linear(hidden, weight, bias), wanted, reduction="sum"
        )


def test_ligers_kernel_is_called_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = types.SimpleNamespace(LigerFusedLinearCrossEntropyLoss=Fused)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", kernels)
    monkeypatch.setattr(loss, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(loss, "FOR_LIGER", "cpu")
    model, batch = model_of("tied"), a_batch()
    expected, found = plain(copy.deepcopy(model), batch), TargetLoss(model)(model, batch)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    assert float(TargetLoss(model)(model, a_batch(targets=False)).loss.detach()) == 0


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 10 * 97)
    head = nn.Linear(8, 97).requires_grad_(False)
    hidden = torch.randn(40, 51, 8, requires_grad=True)
    ids = torch.randint(97, (40, 51))
    head.__class__ = LossHead
    assert isinstance(head, LossHead)
    with LiveBytes() as live, head.expecting(batch_of(ids, ids)):
        head(hidden)[0, 0, 0].backward()
    # Half of whole logits, most of it hidden states and their gradients; plain they live 3 times.
    assert 0 < live.most < 4 * 97 * 40 * 50 / 2


def losses(world: World, options: dict[str, Any], chunk: int) -> list[float]:
    loss.CHUNK, before = chunk, loss.CHUNK
    try:
        runs.run(world, options)
    finally:
        loss.CHUNK = before
    return [line["loss"] for line in runs.metrics(Path(options["output_dir"])) if "loss" in line]


@pytest.mark.parametrize("engine", ["zero3", pytest.param("fsdp", marks=pytest.mark.heavy)])
def test_engines_train_alike_in_chunks(ranks: Any, even: Path, tmp_path: Path, engine: str) -> None:
    case = {"max_steps": 3, "lora_dropout": 0.0, "gradient_checkpointing": True}
    both = [
        ranks(2).run(losses, tiny_runs.options(even, tmp_path / str(chunk), engine, **case), chunk)[
            0
        ]
        for chunk in (2**26, 64)
    ]
    assert len(both[0]) == 3 and both[0] == pytest.approx(both[1], rel=1e-6)
