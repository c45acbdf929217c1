"""From the name of a data set to the token batches of each rank.

Arrows run downward: ``prepare -> tokenize -> prompts`` and
``prepare -> sources -> generated, malformed``; ``batches`` and ``collate`` know token columns
alone.
"""

from scalora_dist.data.arguments import DataArguments
from scalora_dist.data.batches import GlobalBatches, RankBatches, eval_batches
from scalora_dist.data.collate import Collator, PaddedExamples
from scalora_dist.data.prepare import Prepared, prepare_data

__all__ = [
    "Collator",
    "DataArguments",
    "GlobalBatches",
    "PaddedExamples",
    "Prepared",
    "RankBatches",
    "eval_batches",
    "prepare_data",
]
