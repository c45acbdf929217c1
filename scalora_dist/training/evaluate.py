"""Loss and exact match on held-out examples, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from scalora_dist.data.batches import eval_batches
from scalora_dist.data.collate import Collator, PaddedExamples
from scalora_dist.data.tokenize import IGNORE
from scalora_dist.distributed.world import World
from scalora_dist.modeling.loss import TargetLoss, Targets


@dataclass(frozen=True)
class Evaluation:
    loss: float  # mean over the target tokens of all examples
    exact_match: float  # share of examples whose every target greedy decoding would produce
    examples: int


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
    """Evaluate ``module`` on all of ``dataset``, ``batch_size`` examples per rank at a time.

    Calls ``each_batch`` on the way. Leaves the module in training mode.

    Needs no generation: greedy decoding gives an example's targets exactly when, teacher-forced,
    the argmax at each target position is the target. Two scalars per batch stay on the device; one
    all-reduce at the end.
    """
    examples = PaddedExamples(dataset)
    batches = eval_batches(len(dataset), batch_size, world.rank, world.size)
    totals = torch.zeros(3, dtype=torch.float64)  # loss, targets, exact matches
    module.eval()
    for batch in tqdm(batches, "evaluating", disable=None if world.is_main else True, leave=False):
        each_batch()
        tensors = collate([examples[i] for i in batch])
        inputs = {name: tensor.to(world.device) for name, tensor in tensors.items()}
        found = loss(module, inputs)
        # Of an example that was cut, not every target has been seen.
        whole = [i is not None and not dataset[i]["truncated"] for i in batch]
        totals += _totals(found, inputs["labels"], torch.tensor(whole).to(world.device)).cpu()
    module.train()
    total, targets, matches = world.sum(*totals.tolist())
    return Evaluation(total / targets, matches / len(dataset), len(dataset))


def _totals(found: Targets, labels: Tensor, whole: Tensor) -> Tensor:
    """Summed loss, target tokens and exact matches; ``whole`` (examples,): may match at all."""
    counts = labels[:, 1:] != IGNORE
    right = torch.ones_like(counts)
    assert found.right is not None
    right[counts] = found.right
    matches = (right.all(1) & whole).sum()
    return torch.stack([found.loss.double(), counts.sum().double(), matches.double()])


def evaluation_before(
    history: Sequence[dict[str, Any]], dataset: Dataset | None
) -> Evaluation | None:
    """The evaluation at step 0 of a run that goes on, from its lines of metrics.jsonl."""
    for record in history:
        if "eval_loss" in record and record["step"] == 0 and dataset is not None:
            return Evaluation(record["eval_loss"], record["eval_exact_match"], len(dataset))
    return None
