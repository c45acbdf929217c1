"""Which layers the rank monitor follows, and the update's rank is measured of."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.methods.rank_monitor import spread_out

KINDS = [f"self_attn.{name}_proj" for name in "qkvo"]
KINDS += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LLAMA_2_7B = [f"model.layers.{i}.{kind}" for i in range(32) for kind in KINDS]
GEMMA_3_12B = [f"model.language_model.layers.{i}.{kind}" for i in range(48) for kind in KINDS]
# Bamba's: three blocks of four have a mixer, the others have attention. Each has experts.
HYBRID = [
    f"model.layers.{i}.{name}"
    for i in range(12)
    for name in (
        *(["q_proj", "o_proj"] if i % 4 == 3 else ["mamba.in_proj"]),
        *(f"experts.{j}.up_proj" for j in range(3)),
    )
]


def kind(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


def block(name: str) -> int:
    return int(name.partition("layers.")[2].partition(".")[0])


@pytest.mark.parametrize("names", [LLAMA_2_7B, GEMMA_3_12B])
def test_eight_layers_have_every_kind_and_depth(names: list[str]) -> None:
    chosen, blocks = spread_out(names, 8), len({block(name) for name in names})
    assert {kind(name) for name in chosen} == {kind(name) for name in names}
    depths = [block(name) for name in chosen]
    gaps = [after - before for before, after in zip(depths, [*depths[1:], blocks], strict=True)]
    assert depths[0] == 0 and min(gaps) > 0 and max(gaps) < 2 * blocks / 8


@pytest.mark.parametrize("names", [LLAMA_2_7B, GEMMA_3_12B, HYBRID, LLAMA_2_7B[:14]])
def test_any_number_is_even(names: list[str]) -> None:
    there = Counter(kind(name) for name in names)
    for count in range(len(names) + 1):
        chosen = spread_out(names, count)
        assert len(set(chosen)) == len(chosen) == count
        assert chosen == [name for name in names if name in chosen]
        taken = Counter({kind: 0 for kind in there})
        taken.update(kind(name) for name in chosen)
        # A kind has fewer than another only if it has no more layers.
        most = max(taken.values())
        assert all(taken[kind] >= min(most - 1, there[kind]) for kind in there)
        for one, share in taken.items():  # of each kind, in steps that are alike
            depth = [name for name in names if kind(name) == one]
            places = [i for i, name in enumerate(depth) if name in chosen]
            steps = {after - before for before, after in pairwise(places)}
            assert not steps or steps <= {len(depth) // share, ceil_div(len(depth), share)}


@pytest.mark.parametrize("count", [len(HYBRID), len(HYBRID) + 1, 10**6])
def test_all_if_there_are_no_more(count: int) -> None:
    assert spread_out(HYBRID, count) == HYBRID


def test_none_of_none() -> None:
    assert spread_out([], 8) == spread_out(HYBRID, 0) == []


def test_a_half_of_the_kinds_is_spread_over_kinds_and_depth() -> None:
    chosen = spread_out(LLAMA_2_7B, 3)
    assert [kind(name).rpartition(".")[2] for name in chosen] == ["q_proj", "v_proj", "gate_proj"]
    assert [block(name) for name in chosen] == [0, 10, 21]
