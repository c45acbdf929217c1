"""What every rank of a test imports, imported once: ranks are forked from a process that has it.

It has run no operator and opened no group, so that no thread is lost in a fork.
"""

from __future__ import annotations

import os

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # more ranks than this machine may have GPUs
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
}

import scalora_dist.engines.deepspeed
import scalora_dist.engines.fsdp
import scalora_dist.training.trainer  # noqa: F401
