"""Computes loss and exact match on held-out examples. Each rank evaluates its share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from scalora_dist.core import host
from scalora_dist.data.batches import eval_batches
from scalora_dist.data.collate import Collator, PaddedExamples
from scalora_dist.data.micro_batch import MicroBatch
from scalora_dist.distributed.world import World
from scalora_dist.modeling.loss import TargetLoss, Targets


@dataclass(frozen=True)
class Evaluation:
    loss: float  # mean over the target tokens of all examples
    exact_match: float  # share of examples whose every target greedy decoding would produce
    examples: int

    @classmethod
    def restored(cls, saved: Mapping[str, Any] | None) -> Evaluation | None:
        """The evaluation whose fields were saved as JSON, in which null is NaN."""
        if saved is None:
            return None
        loss = math.nan if saved["loss"] is None else saved["loss"]
        return cls(loss, saved["exact_match"], saved["examples"])


@torch.no_grad()
def evaluate(
    module: nn.Module,
    loss: TargetLoss,
    dataset: Dataset,
    collate: Collator,
    world: World,
    batch_size: int,
    each_batch: Callable[[], None],
) -> Evaluation:
    """Evaluate ``module`` on all of ``dataset``. A collective: one all-reduce at the end.

    Exact match needs no generation. Greedy decoding produces an example's targets exactly if, with
    teacher forcing, the argmax at each target position is the target. Leaves the module in training
    mode. The host waits for the device once, at the end.

    Args:
        batch_size: examples per rank and batch.
        each_batch: called before each batch. It may end the evaluation by an exception, on all
            ranks before the same batch.
    """
    examples = PaddedExamples(dataset.with_format("numpy", columns=["input_ids", "labels"]))
    truncated = dataset["truncated"][:]
    batches = eval_batches(len(dataset), batch_size, world.rank, world.size)
    device = world.device
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # loss, exact matches
    targets = 0
    module.eval()
    shown = tqdm(batches, "evaluating", disable=None if world.is_main else True, leave=False)
    try:
        for batch in shown:
            each_batch()
            inputs = collate([examples[i] for i in batch])
            # A truncated example is never an exact match: some of its targets were cut off.
            whole = torch.tensor([i is not None and not truncated[i] for i in batch])
            inputs, whole = inputs.to(device), host.to_device(whole, device)
            totals += _totals(loss(module, inputs), inputs, whole)
            targets += len(inputs.targets)
    finally:
        module.train()
    total, matches, count = world.sum(*totals, targets)
    return Evaluation(total / count, matches / len(dataset), len(dataset))


def _totals(found: Targets, batch: MicroBatch, whole: Tensor) -> Tensor:
    """(2,) float64: summed loss, number of exact matches.

    Args:
        whole: (examples,) bool: False for examples that cannot count as a match.
    """
    assert found.right is not None
    examples, length = batch.input_ids.shape
    example = batch.predicting // length  # of each target
    wrong = torch.zeros(examples, dtype=torch.int64, device=whole.device)
    wrong.index_add_(0, example, (~found.right).long())
    matches = ((wrong == 0) & whole).sum()
    return torch.stack([found.loss.double(), matches.double()])
