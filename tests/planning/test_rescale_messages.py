"""What a plan says of a rescale's messages, against what the methods send on one rank of many.

The other ranks do not exist: a collective takes this rank's tensors and leaves memory as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig

from scalora_dist.config.parser import parse_options
from scalora_dist.core.grams import Grams
from scalora_dist.distributed.world import World
from scalora_dist.engines.layer_shards import LayerShards, factor_shards
from scalora_dist.layers.carry_linear import CarryLinear
from scalora_dist.methods import scalora
from scalora_dist.methods.carry import Carry
from scalora_dist.methods.merger import IntoWeights, Merger
from scalora_dist.methods.scalora import Rescaler
from scalora_dist.planning.arguments import PlanArguments, config_folder
from scalora_dist.planning.planner import Planner
from scalora_dist.planning.ranges import Sharding
from scalora_dist.planning.residency import Message, others
from scalora_dist.profiling.traffic import Traffic
from tests.support.tiny_models import SIZES
from tools.fake_gpu.layers import ShardsEngine, fake_layers, known_ranges
from tools.gpu.gemma import projection_shapes, text_config
from tools.time_rescale_host import alone, unmoved

ENGINES: dict[Sharding, list[str]] = {
    "zero1": ["--ds_config", "zero2"],
    "zero3": ["--ds_config", "zero3"],
    "fsdp": ["--fsdp"],
}
SHAPES = [*[(20, 20)] * 4, *[(24, 20)] * 2, (20, 24)] * 2  # of the small model's projections
RANK, R, ROOM = 4, 4, 8
Counted = tuple[int, int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(**SIZES | {"hidden_size": 20, "num_key_value_heads": 2}).save_pretrained(folder)
    return folder


def planned(model: Path, *words: str, gpus: Sequence[int]) -> list[list[Message]]:
    """The messages of a rescale on so many GPUs each."""
    given = ["--model_name_or_path", str(model), "--max_length", "8", "--output_dir", "."]
    options = parse_options([*given, *words])
    planner = Planner(options, PlanArguments())
    return [planner.plan(options, size).rescale for size in gpus]


def filled(messages: Sequence[Message], about: str) -> Counted:
    """Bytes that all-gathers and that other collectives fill for the messages ``about``."""
    chosen = [message for message in messages if about in message.what]
    gathered = sum(m.received / others(m.ranks) for m in chosen if not m.summed)
    # All-reduces fill each byte once, and receive it about twice. Split rows are as received.
    summed = sum(
        m.received / (1 if "split rows" in m.what else 2 * others(m.ranks))
        for m in chosen
        if m.summed
    )
    return round(gathered), round(summed)


@contextmanager
def layers_of(
    sharding: Sharding, shapes: Sequence[tuple[int, int]], size: int, rank: int, carry: int = 0
) -> Iterator[tuple[World, list[LayerShards]]]:
    """The layers of the middle one of ``size`` ranks, on the CPU."""
    with alone(size) as world, known_ranges(sharding):
        layers = fake_layers(world, sharding, shapes, rank=rank, moments=False, carry=carry)
        for layer in layers:
            for shard in (layer.A, layer.B, *(layer.carry or ())):
                shard.local.fill_(1)
        yield world, layers


def counted(traffic: Traffic) -> Counted:
    return traffic.gathered, traffic.received - traffic.gathered


def of_a_compression(
    sharding: Sharding, shapes: Sequence[tuple[int, int]], size: int, *, rank: int, columns: int
) -> Counted:
    """What a compression of all carries fills."""
    with layers_of(sharding, shapes, size, rank, columns) as (world, layers):
        modules = cast(dict[str, CarryLinear], ShardsEngine(world, layers).adapted)
        carry = Carry(layers, modules, world, rank=R, limit=1.0)
        # The numbers of other ranks' layers do not come.
        with patch.object(Carry, "_note"), Traffic() as traffic:
            carry.compress(layers, range(len(layers)))
        return counted(traffic)


@pytest.mark.parametrize(
    ("sharding", "size"),
    # 14 layers: 15 rows of solutions, 14, 26; then an all-reduce of 14.
    [("zero3", 3), ("zero1", 14), ("fsdp", 26), ("zero3", 28), ("fsdp", 64), ("zero1", 1024)],
)
def test_the_messages_of_a_full_carry(model: Path, sharding: Sharding, size: int) -> None:
    words = ["--rank", str(RANK), "--merge_target", "carry"]
    words += ["--carry_rank", str(R), "--carry_room", str(ROOM), "--bf16"]
    (messages,) = planned(model, *ENGINES[sharding], *words, gpus=[size])
    found = of_a_compression(sharding, SHAPES, size, rank=RANK, columns=R + ROOM)
    assert found == filled(messages, "of a carry")
    row = 8 * (2 * (R + ROOM) ** 2 + 3)
    assert found[0] == row * {3: 15, 14: 14, 26: 26}.get(size, 0)


@pytest.mark.parametrize(
    ("sharding", "size", "summed"),
    [
        ("zero1", 3, True),
        ("zero3", 3, False),
        ("fsdp", 3, False),
        ("fsdp", 39, False),  # 20 rows, and 19 of padding
        ("fsdp", 45, True),  # only those of 24 rows are gathered
        ("fsdp", 64, True),
    ],
)
def test_the_gather_of_the_factors(
    model: Path, sharding: Sharding, size: int, *, summed: bool
) -> None:
    (messages,) = planned(model, *ENGINES[sharding], "--rank", str(RANK), gpus=[size])
    with layers_of(sharding, SHAPES, size, RANK) as (world, layers), Traffic() as traffic:
        layout = Merger(layers, world, IntoWeights(layers, "nearest")).layout
        layout.gather_stacks(factor_shards(layers), range(2 * len(layers)))
    assert counted(traffic) == filled(messages, "A and B")
    assert (counted(traffic)[1] > 0) == summed


@pytest.mark.parametrize("size", [3, 14, 64])
def test_the_scales(model: Path, size: int) -> None:
    (messages,) = planned(model, *ENGINES["zero3"], "--rank", str(RANK), gpus=[size])
    with layers_of("zero3", SHAPES, size, RANK) as (world, layers):
        merger = Merger(layers, world, IntoWeights(layers, "nearest"))
        rescaler = Rescaler(merger, rule="paper", eta_lipschitz=0.1, bounds=(0.05, 5.0))
        sums = torch.eye(2 * RANK, dtype=torch.float64).repeat(2 * len(layers), 1, 1)
        grams = Grams(sums, sums[:, 0, :0], sums[:, :0])
        with patch.object(scalora, "solve", unmoved), Traffic() as traffic:
            assert rescaler.solve(layers, grams)
    assert counted(traffic) == filled(messages, "scales")


@pytest.mark.heavy
def test_gemma_3_12b() -> None:
    """Its carries are in several buckets, of which each has fewer layers than 1,024 ranks."""
    gemma = Path(config_folder("google/gemma-3-12b-pt"))
    config = text_config(smoke=False)
    shapes = [*projection_shapes(config).values()] * config.num_hidden_layers
    words = [*ENGINES["zero3"], "--bf16", "--load_in_4bit", "--rank", "8"]
    sizes = [24, 1024]
    for size, messages in zip(sizes, planned(gemma, *words, gpus=sizes), strict=True):
        found = of_a_compression("zero3", shapes, size, rank=8, columns=56 + 32)
        assert found == filled(messages, "of a carry")
        whole = 8 * 336 * (2 * 88**2 + 3)
        received = sum(m.received for m in messages if "solutions of a carry" in m.what)
        assert 0.95 * whole < received < 2 * whole
