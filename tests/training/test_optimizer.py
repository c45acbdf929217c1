"""Every schedule's learning rates against transformers' own, over whole and resumed runs."""

from __future__ import annotations

import inspect
import math
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_polynomial_decay_schedule_with_warmup, get_scheduler

from scalora_dist.checkpoint.run_state import restore_schedule
from scalora_dist.config.parser import parse_options
from scalora_dist.config.training import POLYNOMIAL_END, Schedule
from scalora_dist.errors import UserError
from scalora_dist.methods.registry import METHODS
from scalora_dist.methods.relora import warmed_up_again
from scalora_dist.training.optimizer import make_optimizer, make_schedule
from tests.support import runs
from tests.support.refusals import one_sentence

STEPS = 13
SCHEDULES = get_args(Schedule)
WARM_UPS = (0.0, 0.03, 0.5, 1.0)
RATES = (1e-5, 2e-4, 1e-3, 1e-2)


def schedule(**options: Any) -> LambdaLR:
    """The schedule of a run of ``STEPS`` steps with one trained A and one B."""
    parsed = parse_options(runs.words({"output_dir": "out", **options}))
    method = METHODS[parsed.method.name]
    parameters = {f"layer.{factor}": nn.Parameter(torch.zeros(1)) for factor in "BA"}
    return make_schedule(make_optimizer(method, parsed, parameters), method, parsed, STEPS)


def rates_of(schedule: LambdaLR, steps: int) -> list[list[float]]:
    """The groups' learning rates at each of the next steps: (steps, groups)."""
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return found


def transformers_rates(name: str, warm_up: float, rate: float) -> list[float]:
    """The learning rates of the steps by transformers alone."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=rate)
    theirs = get_scheduler(name, optimizer, math.ceil(STEPS * warm_up), STEPS)
    # Polynomial divides by 0 after the last step where all steps are warm-up.
    return [x for (x,) in rates_of(theirs, STEPS - 1)] + [optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("warm_up", WARM_UPS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_those_of_transformers(name: str, warm_up: float, rate: float) -> None:
    """Over a whole run and after a restore at each of its steps; two groups keep their ratio."""
    given = {"lr_scheduler_type": name, "warmup_ratio": warm_up, "learning_rate": rate}
    expected = transformers_rates(name, warm_up, rate)
    for others, ratios in (
        ({"method": "lora"}, [1.0]),
        ({"method": "lora-plus", "lr_ratio": 4}, [1.0, 4.0]),
        ({"method": "lora-plus", "lr_ratio": 0.25}, [0.25, 1.0]),
    ):
        wanted = [[ratio * x for ratio in ratios] for x in expected]
        assert rates_of(schedule(**given, **others), STEPS) == [
            pytest.approx(step, rel=1e-12, abs=1e-30) for step in wanted
        ]
        for taken in range(STEPS + 1):  # the last: the end of the run, where a checkpoint may be
            resumed = schedule(**given, **others)
            restore_schedule(resumed, taken)
            assert rates_of(resumed, STEPS - taken) == [
                pytest.approx(step, rel=1e-12, abs=1e-30) for step in wanted[taken:]
            ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_relora_warms_them_up_again(name: str) -> None:
    given = {"lr_scheduler_type": name, "warmup_ratio": 0.03, "learning_rate": 2e-4}
    relora = {"method": "relora", "relora_interval": 5, "relora_warmup_steps": 2}
    plain = transformers_rates(name, 0.03, 2e-4)
    warmed = warmed_up_again(plain.__getitem__, interval=5, warmup_steps=2)
    wanted = [pytest.approx([warmed(step)], rel=1e-12) for step in range(STEPS)]
    assert rates_of(schedule(**given, **relora), STEPS) == wanted
    assert wanted[6] != [plain[6]], "a step of a second warm-up"
    resumed = schedule(**given, **relora)
    restore_schedule(resumed, 6)
    assert rates_of(resumed, STEPS - 6) == wanted[6:]


def test_polynomial_must_begin_above_its_end() -> None:
    theirs = inspect.signature(get_polynomial_decay_schedule_with_warmup).parameters["lr_end"]
    assert theirs.default == POLYNOMIAL_END
    for rate in (1e-7, 1e-8):
        with pytest.raises(UserError) as error:
            schedule(lr_scheduler_type="polynomial", learning_rate=rate, method="lora")
        assert f"--learning_rate {rate}" in one_sentence(error) and "polynomial" in str(error.value)
        schedule(lr_scheduler_type="linear", learning_rate=rate, method="lora")
    schedule(lr_scheduler_type="polynomial", learning_rate=1.1e-7, method="lora")
