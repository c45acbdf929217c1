"""What servers are known to refuse of an adapter."""

from __future__ import annotations

import pytest

from scalora_dist.model_io.serving import served_rank, vllm_objections

USUAL = [
    f"model.layers.{i}.{x}"
    for i in range(2)
    for x in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
]


def test_the_next_rank_that_a_server_can_be_set_to() -> None:
    found = {rank: served_rank(rank) for rank in (1, 8, 9, 64, 72, 257, 321, 512, 513)}
    assert found == {
        1: 8,
        8: 8,
        9: 16,
        64: 64,
        72: 128,
        257: 320,
        321: 512,
        512: 512,
        513: None,
    }


@pytest.mark.parametrize("prefix", ["", "model.language_model."])
def test_usual_layers_are_served(prefix: str) -> None:
    assert vllm_objections([prefix + name for name in USUAL], 512) is None


@pytest.mark.parametrize(
    ("layers", "rank", "words"),
    [
        ([], 513, "rank 513 is above 512, the largest --max-lora-rank"),
        (["model.project_out"], 8, "model.project_out is in no decoder block"),
        (["model.layers.1.mlp.gate"], 8, "model.layers.1.mlp.gate routes tokens"),
        (["model.layers.1.mlp.experts.3.up_proj"], 8, "experts.3.up_proj is one of several"),
        (["backbone.layers.0.mixer.in_proj"], 8, "mixer.in_proj belongs to a state-space"),
        (["model.layers.0.linear_attn.in_proj_qkvz"], 8, "in_proj_qkvz belongs to a state-space"),
    ],
)
def test_an_objection_names_a_layer(layers: list[str], rank: int, words: str) -> None:
    found = vllm_objections(USUAL + layers, rank)
    assert found is not None and words in found and "\n" not in found
    assert found.count(";") == 0


def test_all_objections_are_in_one_sentence() -> None:
    found = vllm_objections(["project_out", "layers.0.gate", "layers.1.gate"], 1000)
    assert found is not None and found.count(";") == 2 and "layers.1" not in found
