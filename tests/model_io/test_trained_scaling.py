"""The scale that a saved adapter's A contains, and the options that train as before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scalora_dist.config.method import MethodArguments
from scalora_dist.model_io.import_adapter import as_trained
from scalora_dist.model_io.peft_format import TrainedScaling, saved_factors, unscaled

LORA = MethodArguments(method="lora", rank=8, lora_alpha=16)
ALL = {"a": 2.0, "b": 2.0}


@pytest.mark.parametrize("scaling", [2.0, 0.25, 2.4, 256 / 3, 1e-3])
def test_a_scaled_factor_comes_back(scaling: float) -> None:
    a, b = torch.randn(50, 3), torch.randn(40, 3)
    left, right = saved_factors(a, b, scaling, 5)
    assert left.dtype == right.dtype == torch.float32
    assert not left[:, 3:].any() and not right[3:].any()
    torch.testing.assert_close(left[:, :3], scaling * a)
    assert torch.equal(right[:3].T, b)
    back = unscaled(left[:, :3], 1.0, scaling)
    ulps = (back.view(torch.int32) - a.view(torch.int32)).abs().max()
    assert ulps <= (0 if scaling in (2.0, 0.25) else 1)
    assert torch.equal(unscaled(a, scaling, scaling), a)


@pytest.mark.parametrize("scalings", [ALL, {"a": 2.4, "b": 1 / 3}])
def test_what_is_written_is_read(scalings: dict[str, float]) -> None:
    trained = TrainedScaling(LORA, scalings)
    metadata = trained.metadata()
    assert ('"a"' in metadata[TrainedScaling.KEY]) == (len(set(scalings.values())) > 1)
    assert TrainedScaling.read(metadata, {"a": 64, "b": 64}) == trained
    assert TrainedScaling.read({"format": "pt"}, {"a": 8}) is None
    assert TrainedScaling.read(None, {"a": 8}) is None


@pytest.mark.parametrize(
    "entry",
    [
        "[]",
        "nonsense",
        '{"rank": 8, "scaling": 2}',
        '{"options": {"rank": 9}, "scaling": 2}',
        '{"options": {"rank": 0}, "scaling": 2}',
        '{"options": {"rank": 2.5}, "scaling": 2}',
        '{"options": {"rank": true}, "scaling": 2}',
        '{"options": {"method": "\\u001b[31m"}, "scaling": 2}',
        '{"options": {"seed": 1}, "scaling": 2}',
        '{"options": {"rank": [1]}, "scaling": 2}',
        '{"options": {"method": ["lora", "--help"]}, "scaling": 2}',
        '{"options": {"method": "--help"}, "scaling": 2}',
        '{"options": {"rank": {"a": 1}}, "scaling": 2}',
        '{"options": {"rank": 8}, "scaling": -2}',
        '{"options": {"rank": 8}, "scaling": {"b": 2}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_entry_is_refused(entry: str) -> None:
    with pytest.raises(ValueError):
        TrainedScaling.read({TrainedScaling.KEY: entry}, {"a": 8})


CARRY = MethodArguments(rank=8, lora_alpha=16, merge_target="carry", carry_rank=56)
ALPHA_II = MethodArguments(method="lora-alpha", alpha_variant="II", alpha_multiplier=0.5)
OTHER = {"a": 5.0, "b": 15.0}


@pytest.mark.parametrize(
    ("trained", "args", "ours", "expected"),
    [
        (TrainedScaling(LORA, ALL), LORA, ALL, None),
        (TrainedScaling(LORA, {"a": 2.4, "b": 2.4}), LORA, {"a": 12 / 5, "b": 12 / 5}, None),
        # Another method with the same rank and scales trains on as well.
        (TrainedScaling(LORA, ALL), replace(LORA, method="scalora"), ALL, None),
        (
            TrainedScaling(LORA, ALL),
            replace(LORA, lora_alpha=24),
            {"a": 3.0, "b": 3.0},
            "--lora_alpha 16",
        ),
        (
            TrainedScaling(ALPHA_II, OTHER),
            replace(ALPHA_II, alpha_multiplier=1.0),
            {"a": 10.0, "b": 30.0},
            "--alpha_multiplier 0.5",
        ),
        (
            TrainedScaling(ALPHA_II, OTHER),
            LORA,
            ALL,
            "--method lora-alpha --alpha_variant II --alpha_multiplier 0.5",
        ),
        (TrainedScaling(LORA, ALL), ALPHA_II, OTHER, "--method lora --lora_alpha 16"),
        (
            TrainedScaling(CARRY, ALL),
            replace(LORA, rank=64, lora_alpha=128),
            ALL,
            "--method scalora --rank 8 --lora_alpha 16 --merge_target carry --carry_rank 56",
        ),
        (
            TrainedScaling(CARRY, ALL),
            replace(CARRY, rank=4, lora_alpha=8, carry_rank=60),
            ALL,
            "--rank 8 --lora_alpha 16 --carry_rank 56",
        ),
    ],
)
def test_the_options_that_train_as_before(
    trained: TrainedScaling, args: MethodArguments, ours: dict[str, float], expected: str | None
) -> None:
    assert as_trained(trained, args, ours) == expected
