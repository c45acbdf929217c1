"""Which engine a command line gets, and which batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scalora_dist.config.options import Options
from scalora_dist.config.parser import parse_options
from scalora_dist.distributed.world import World
from scalora_dist.engines.build import engine_factory
from scalora_dist.engines.local import LocalEngine
from scalora_dist.errors import UserError
from scalora_dist.layers.fourbit_linear import FourBit
from scalora_dist.modeling.load import BaseModelSpec
from scalora_dist.training.resolve import resolve, resolve_batch
from tests.support import runs
from tests.support.refusals import one_sentence

ZERO3 = runs.ds_config("zero3")


def options(**given: Any) -> Options:
    return parse_options(runs.words({"output_dir": "out", **given}))


def world(size: int) -> World:
    """Ranks that no message passes between: nothing here sends one."""
    return World(0, size, 0, torch.device("cpu"), store=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "dtype"), [({}, torch.float32), ({"bf16": True}, torch.bfloat16)]
)
def test_one_rank_needs_no_engine(given: dict[str, bool], dtype: torch.dtype) -> None:
    engine = engine_factory(
        options(max_grad_norm=0.7, **given), world(1), BaseModelSpec(576, None, False)
    )()
    assert type(engine) is LocalEngine
    assert (engine.dtype, engine.max_grad_norm) == (dtype, 0.7)


def refused(size: int, **given: Any) -> str:
    base = BaseModelSpec(576, None, False)
    with pytest.raises(UserError) as error:
        engine_factory(resolve(options(**given), size, base), world(size), base)
    return one_sentence(error)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"fsdp_config": "f.yaml"}, "--fsdp_config without --fsdp"),
        ({"fsdp_config": "f.yaml", "ds_config": ZERO3}, "--fsdp_config without --fsdp"),
        ({"fsdp": True, "ds_config": ZERO3}, "give one"),
        ({"fsdp": True, "fp16": True}, "--bf16"),
        ({"fsdp": True, "fsdp_config": "no/such.yaml"}, "no/such.yaml"),
        ({"ds_config": "no/such.json"}, "no/such.json"),
    ],
)
def test_what_does_not_go_together(size: int, given: dict[str, Any], says: str) -> None:
    assert says in refused(size, **given)


def test_fsdp_casts_no_codes(tmp_path: Path) -> None:
    """fp32 weights that are computed in bf16, with codes kept in fp32 tensors."""
    path = tmp_path / "mixed.yaml"
    path.write_text("mixed_precision: {param_dtype: bf16}")
    given = options(fsdp=True, fsdp_config=path)
    for storage, refuses in ((torch.float32, True), (torch.uint8, False)):
        base = BaseModelSpec(576, FourBit("nf4", True, None, storage), False)
        if refuses:
            with pytest.raises(UserError) as error:
                engine_factory(given, world(2), base)
            assert "--bnb_4bit_quant_storage" in one_sentence(error)
        else:
            engine_factory(given, world(2), base)


def test_several_ranks_need_an_engine() -> None:
    message = refused(3)
    assert all(word in message for word in ("3 ranks", "--ds_config", "--fsdp"))


def test_one_rank_without_an_engine_has_no_fp16() -> None:
    message = refused(1, fp16=True)
    assert "--bf16" in message and "--ds_config" in message


def test_a_file_of_settings_is_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "fsdp.yaml"
    path.write_text("mesh_shape: [2, 2]")
    assert "mesh_shape" in refused(2, fsdp=True, fsdp_config=path)


@pytest.mark.parametrize(
    ("ranks", "given", "batch", "accumulation"),
    [
        (3, {}, 3, 1),
        (3, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5}, 30, 5),
        (3, {"per_device_train_batch_size": 2, "train_batch_size": 12}, 12, 2),
        (4, {"train_batch_size": 12}, 12, 3),
        (1, {"train_batch_size": 12, "gradient_accumulation_steps": 12}, 12, 12),
        (2, {"train_batch_size": 2, "gradient_accumulation_steps": 1}, 2, 1),
    ],
)
def test_the_global_batch_is_settled(
    ranks: int, given: dict[str, int], batch: int, accumulation: int
) -> None:
    train = options(**given).train
    for _ in range(2):  # what is resolved stays so
        train = resolve_batch(train, ranks)
        assert (train.train_batch_size, train.gradient_accumulation_steps) == (batch, accumulation)


@pytest.mark.parametrize(
    ("ranks", "given", "says"),
    [
        (5, {"train_batch_size": 12}, "no multiple of 5 rank(s)"),
        (3, {"train_batch_size": 12, "per_device_train_batch_size": 3}, "3 examples"),
        (4, {"train_batch_size": 2}, "no multiple of 4 rank(s)"),
        (
            2,
            {"train_batch_size": 12, "gradient_accumulation_steps": 4},
            "leave out --gradient_accumulation_steps",
        ),
    ],
)
def test_a_global_batch_that_ranks_cannot_share(
    ranks: int, given: dict[str, int], says: str
) -> None:
    with pytest.raises(UserError) as error:
        resolve_batch(options(**given).train, ranks)
    message = one_sentence(error)
    assert says in message and str(given["train_batch_size"]) in message


@pytest.mark.parametrize(
    ("given", "eta_lipschitz"),
    [
        ({}, 0.15 * 8**0.5),  # at the defaults, r = 8 and lora_alpha = 16
        ({"rank": 4, "lora_alpha": 4}, 1.2),
        ({"rank": 4, "eta_lipschitz": 0.3}, 0.3),
        ({"method": "lora"}, None),
    ],
)
def test_eta_l_is_decided_once(given: dict[str, Any], eta_lipschitz: float | None) -> None:
    """So a resume compares numbers, whatever the default is then."""
    resolved = options(**given)
    for _ in range(2):
        resolved = resolve(resolved, 1, BaseModelSpec(576, None, False))
        found = resolved.method.eta_lipschitz
        assert found is None if eta_lipschitz is None else found == pytest.approx(eta_lipschitz)


@pytest.mark.parametrize("size", ["0", "-12", "1.5"])
def test_a_global_batch_is_a_positive_whole_number(size: str) -> None:
    with pytest.raises(UserError) as error:
        options(train_batch_size=size)
    assert "train_batch_size" in one_sentence(error)
