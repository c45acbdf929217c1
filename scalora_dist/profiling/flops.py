"""Counts the floating-point operations of a micro-batch, on a model without storage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    addmm_flop,
    flop_registry,
    register_flop_formula,
)
from transformers import PreTrainedModel

aten = torch.ops.aten
if aten.addmm_ not in flop_registry:  # the product that adds in place
    register_flop_formula(aten.addmm_, get_raw=True)(addmm_flop)
FORMULAS = flop_registry  # {operator: torch's function of its FLOPs}
LENGTHS = (64, 128)  # tokens of the counted examples; any two lengths would do


@dataclass(frozen=True)
class Cost:
    """FLOPs of b examples of length L: ``fixed + b·(linear·L + quadratic·L²)``.

    Attention causes the L² term. Products of weights alone, as in DoRA, are fixed.
    """

    fixed: float
    linear: float
    quadratic: float

    def __call__(self, examples: int, length: int) -> float:
        return self.fixed + examples * (self.linear * length + self.quadratic * length**2)


@dataclass(frozen=True)
class Flops:
    """FLOPs of matrix products: each multiplication and each addition is one.

    Padding and masked pairs are included. The backward is that of the training: a frozen weight has
    no gradient. What gradient checkpointing computes twice is counted once.

    Attributes:
        forward: FLOPs of the forward, with the LM head at every token.
        backward: FLOPs of the backward, likewise; a training step has the head at targets only.
        head: FLOPs of the LM head for one token, forward and backward.
    """

    forward: Cost
    backward: Cost
    head: float

    def step(self, examples: int, length: int, targets: int) -> float:
        """FLOPs of a micro-batch, forward and backward; ``examples`` are padded to ``length``."""
        without = self.head * (examples * length - targets)
        return self.forward(examples, length) + self.backward(examples, length) - without


def count_flops(model: nn.Module) -> Flops:
    """The FLOPs of ``model`` with its adapters. Its frozen parameters get no gradient.

    Args:
        model: causal language model on "meta", from ``modeling.load.outline``. It has eager
            attention, in which every product is visible. Nothing is computed.

    Raises:
        RuntimeError: the forward depends on values, which "meta" does not have, or the model has
            experts, whose products torch does not count.
    """
    if any("expert" in name for name, _ in model.named_parameters()):
        raise RuntimeError("it has routed experts")
    short, long = LENGTHS
    shapes = ((1, short), (2, short), (1, long))
    forward, backward = zip(*(_count(model, *shape) for shape in shapes), strict=True)
    return Flops(_solve(*forward), _solve(*backward), _of_head(model))


def _count(model: nn.Module, examples: int, length: int) -> tuple[int, int]:
    """FLOPs of the forward and of the backward."""
    tokens = torch.zeros(examples, length, dtype=torch.int64, device="meta")
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with FlopCounterMode(display=False) as forward:
        loss = model(**batch, use_cache=False).logits.float().sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return forward.get_total_flops(), backward.get_total_flops()


def _of_head(model: nn.Module) -> float:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(head) is not nn.Linear:  # `TargetLoss` leaves such a head as it is
        return 0.0
    return 2.0 * head.weight.numel() * (3 if head.weight.requires_grad else 2)


def _solve(one: int, two: int, longer: int) -> Cost:
    """The coefficients, from the FLOPs of one short example, two short ones and one longer one."""
    short, long = LENGTHS
    example = two - one
    fixed = one - example
    quadratic = ((longer - fixed) / long - example / short) / (long - short)
    return Cost(fixed, example / short - quadratic * short, quadratic)
