"""Part loss: forward and backward of Gemma-3-12B's LM head and loss, computed in three ways.

The trainer takes Liger's kernel on GPUs where it is installed, else chunks. Liger's chunks are the
smaller, the larger the vocabulary: each has some 32 tokens here, and reads the whole head twice.
PEFT's users compute full logits. Of bfloat16, for one micro-batch of part step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_liger_kernel_available

from scalora_dist.data.collate import batch_of
from scalora_dist.data.micro_batch import MicroBatch
from scalora_dist.modeling import loss as loss_module
from scalora_dist.modeling.loss import LossHead, target_losses
from scalora_dist.profiling.memory import restart_peak
from scalora_dist.training.run_log import write_json
from tools.gpu.gemma import text_config
from tools.gpu.merge import seconds_of
from tools.gpu.part import run_part

SHAPE, SMOKE_SHAPE = (8, 256), (2, 16)  # examples and tokens of a micro-batch


def loss_of(way: str, head: LossHead, hidden: Tensor, batch: MicroBatch) -> Tensor:
    """The summed loss by Liger, in chunks, or from full logits."""
    if way == "full logits":
        return target_losses(head(hidden), batch).loss
    kind = loss_module.FOR_LIGER if way == "Liger" else ""
    with patch.object(loss_module, "FOR_LIGER", kind), head.expecting(batch):
        return head(hidden).flatten()[0]


def measure(file: Path, *, smoke: bool) -> None:
    """Measure, and write ``file`` anew after each way."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, shape = text_config(smoke=smoke), SMOKE_SHAPE if smoke else SHAPE
    width, vocabulary = config.hidden_size, config.vocab_size
    head: Any = nn.Linear(width, vocabulary, bias=False, dtype=torch.bfloat16, device=device)
    head.requires_grad_(False)
    head.__class__ = LossHead
    ids = torch.randint(vocabulary, shape)
    batch = batch_of(ids, ids).to(device)
    hidden = torch.randn(*shape, width, dtype=torch.bfloat16, device=device).requires_grad_()
    ways = ["chunks", "full logits"]
    if device.type == "cuda" and is_liger_kernel_available():
        ways = ["Liger", *ways]
    rows: list[dict[str, Any]] = []
    for way in ways:

        def work(way: str = way) -> None:
            hidden.grad = None
            loss_of(way, head, hidden, batch).backward()

        work()
        restart_peak(device)
        seconds = seconds_of(work, 0.01 if smoke else 0.5)
        peak = restart_peak(device) or 0
        rows.append({"way": way, "seconds": seconds, "peak_bytes": peak})
        write_json(file, {"rows": rows})
        print(f"{way}: {1e3 * seconds:.1f} ms, peak {peak / 1e9:.2f} GB", flush=True)


if __name__ == "__main__":
    run_part(__doc__, measure)
