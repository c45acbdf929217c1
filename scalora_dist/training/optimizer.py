"""Makes AdamW and its learning-rate schedule, the same for every engine."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import nn
from transformers import get_scheduler

from scalora_dist.config.options import Options
from scalora_dist.methods.method import Method
from scalora_dist.methods.relora import warmed_up_again

logger = logging.getLogger(__name__)


def make_optimizer(
    method: Method, options: Options, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW with one parameter group for each factor on the learning rate (``Method.rate``).

    The group with the smallest factor comes first: metrics report its learning rate. The
    optimizer's own ``defaults["lr"]`` is ``--learning_rate``.
    """
    train = options.train
    rates: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rates.setdefault(method.rate(name, options.method), []).append(parameter)
    if train.weight_decay and method.merges:
        logger.warning(
            "--weight_decay pulls the weights towards the present W, which merges change, and not "
            "towards the base model: 0 is right for this method"
        )
    return torch.optim.AdamW(
        [
            {"params": group, "lr": rate * train.learning_rate}
            for rate, group in sorted(rates.items())
        ],
        lr=train.learning_rate,  # of no group, but transformers' polynomial schedule reads it
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, method: Method, options: Options, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """transformers' schedule over ``steps``, with another warm-up after each restart.

    Every group has the same factor at each step, so the groups' learning rates keep their ratios.
    """
    train = options.train
    warmup_steps = math.ceil(steps * train.warmup_ratio)
    schedule = get_scheduler(
        train.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps,
        # Polynomial divides by the steps after the warm-up. Where there are none, we name one more,
        # which changes only the rate after the last step.
        num_training_steps=max(steps, warmup_steps + 1),
    )
    if method.restart:
        every, warmup = options.method.relora_interval, options.method.relora_warmup_steps
        if every >= steps:
            logger.warning("--relora_interval %d: no restart in %d steps", every, steps)
        if warmup >= every:
            logger.warning("--relora_warmup_steps do not end within --relora_interval %d", every)
        schedule.lr_lambdas = [
            warmed_up_again(rate, interval=every, warmup_steps=warmup)
            for rate in schedule.lr_lambdas
        ]
    return schedule
