"""How many floating-point operations a micro-batch takes, counted on a model without storage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

LENGTHS = (64, 128)  # any two would do


@dataclass(frozen=True)
class Cost:
    """FLOPs of b examples of length L: ``fixed + b·(linear·L + quadratic·L²)``.

    Attention makes L²; products of weights alone, as DoRA has them, are fixed.
    """

    fixed: float
    linear: float
    quadratic: float

    def __call__(self, examples: int, length: int) -> float:
        return self.fixed + examples * (self.linear * length + self.quadratic * length**2)


@dataclass(frozen=True)
class Flops:
    """Multiplications and additions of matrix products, one each, padding and masked pairs too.

    ``forward`` and ``backward`` have the LM head at every token; a training step has it at its
    targets alone. ``head`` is what it takes for one token, forward and backward.

    The backward is that of the training: a frozen weight has no gradient of its own. What gradient
    checkpointing computes twice is counted once.
    """

    forward: Cost
    backward: Cost
    head: float

    def step(self, examples: int, length: int, targets: int) -> float:
        """Of forward and backward of one micro-batch, ``examples`` padded to ``length`` tokens."""
        without = self.head * (examples * length - targets)
        return self.forward(examples, length) + self.backward(examples, length) - without


def count_flops(model: nn.Module) -> Flops:
    """What ``model`` takes, with its adapters, and with what is frozen in it frozen.

    Args:
        model: a causal language model on "meta", as ``models.outline`` makes it: with eager
            attention, of which every product is seen. Nothing is computed.

    Raises:
        RuntimeError: its forward depends on values, which "meta" has none of, or it has experts,
            whose products torch does not count.
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
    if type(head) is not nn.Linear:  # `TargetLoss` leaves such a one as it is
        return 0.0
    return 2.0 * head.weight.numel() * (3 if head.weight.requires_grad else 2)


def _solve(one: int, two: int, longer: int) -> Cost:
    """The coefficients from the counts of one and two short examples, and of one longer one."""
    short, long = LENGTHS
    example = two - one
    fixed = one - example
    quadratic = ((longer - fixed) / long - example / short) / (long - short)
    return Cost(fixed, example / short - quadratic * short, quadratic)
