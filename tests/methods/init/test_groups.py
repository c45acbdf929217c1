"""Groups of layers, and the passes over the samples that models of known size take."""

from __future__ import annotations

import pytest
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from scalora_dist.methods.init.groups import Budget, group_layers, sum_bytes
from scalora_dist.methods.init.room import HOST_SHARE, device_room
from scalora_dist.planning.arguments import config_folder
from scalora_dist.profiling.gpus import GPUS

GIB = 2**30
SIZES = {"q": 4, "k": 2, "v": 2, "up": 8}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget(16, 0), ["q: device, k: device, v: device, up: device"]),
        (Budget(0, 16), ["q: host, k: host, v: host, up: host"]),
        (Budget(8, 8), ["q: device, k: device, v: device, up: host"]),
        (Budget(4, 4), ["q: device, k: host, v: host", "up: device"]),
        (Budget(3, 10), ["q: host, k: device, v: host", "up: host"]),
        (Budget(2, 7), ["q: host, k: device, v: host", "up: device"]),
        (Budget(0, 0), ["q: device", "k: device", "v: device", "up: device"]),
    ],
)
def test_layers_are_where_there_is_room(budget: Budget, expected: list[str]) -> None:
    groups = group_layers(SIZES, budget)
    assert [", ".join(f"{k}: {v}" for k, v in group.items()) for group in groups] == expected


@pytest.mark.parametrize(
    ("most", "expected"), [(5, (5, 0)), (10, (10, 0)), (25, (10, 15)), (99, (10, 20))]
)
def test_a_bound_takes_from_the_host_first(most: int, expected: tuple[int, int]) -> None:
    assert Budget(10, 20).at_most(most) == expected


def test_rows_that_do_not_divide_are_padded() -> None:
    assert [sum_bytes((7, 3), ranks) for ranks in (1, 2, 8)] == [84, 48, 12]


# (model, ranks, GPU, GiB of activations and gathered weights, GiB of the host; passes with a
# budget of 64 MiB, and with what is free)
RUNS = [
    ("meta-llama/Llama-2-7b-hf", 1, "a100-80g", 24, 128, 224, 1),
    ("meta-llama/Llama-2-7b-hf", 1, "h100-80g", 24, 4, 224, 1),
    ("meta-llama/Llama-2-7b-hf", 1, "h100-80g", 44, 64, 224, 1),
    ("meta-llama/Llama-2-7b-hf", 1, "h100-80g", 44, 4, 224, 2),
    ("google/gemma-3-12b-pt", 8, "h100-80g", 40, 1024, 96, 1),
    ("google/gemma-3-12b-pt", 8, "h100-80g", 60, 16, 96, 1),
    ("google/gemma-3-12b-pt", 8, "rtx4090-24g", 16, 128, 96, 1),
    ("google/gemma-3-12b-pt", 8, "rtx4090-24g", 16, 4, 96, 2),
]


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[list[tuple[int, int]], int]]:
    """{model: ((m, n) of each layer that is adapted, bytes of its weights in bf16)}."""
    found = {}
    for name in {run[0] for run in RUNS}:
        config = AutoConfig.from_pretrained(config_folder(name)).get_text_config()
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
        linear = {x: y for x, y in model.named_modules() if isinstance(y, nn.Linear)}
        del linear["lm_head"]
        shapes = [(layer.out_features, layer.in_features) for layer in linear.values()]
        found[name] = shapes, 2 * sum(p.numel() for p in model.parameters())
    return found


@pytest.mark.parametrize(("model", "ranks", "gpu", "pass_gib", "host_gib", "before", "now"), RUNS)
def test_passes_over_the_samples(
    models: dict[str, tuple[list[tuple[int, int]], int]],
    model: str,
    ranks: int,
    gpu: str,
    pass_gib: int,
    host_gib: int,
    before: int,
    now: int,
) -> None:
    """Weights are sharded over the ranks. A GPU has no other process."""
    shapes, weights = models[model]
    sizes = {str(i): sum_bytes(shape, ranks) for i, shape in enumerate(shapes)}
    assert len(group_layers(sizes, Budget(64 * 2**20))) == before
    free = int(GPUS[gpu].memory_gib * GIB) - weights // ranks
    whole = max(4 * m * n for m, n in shapes) + max(sizes.values())
    budget = Budget(
        device_room(free, pass_gib * GIB + whole), int(HOST_SHARE * host_gib * GIB) // ranks
    )
    assert len(group_layers(sizes, budget)) == now
