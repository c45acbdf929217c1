"""Imports once what every rank of a test needs: ranks are forked from a process that imported it.

That process runs no operator and opens no process group, so it has no threads that a fork loses.
"""

from __future__ import annotations

import functools
import os

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # more ranks than this machine may have GPUs
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
}

from torch.distributed.device_mesh import init_device_mesh

import scalora_dist.engines.deepspeed
import scalora_dist.engines.fsdp
import scalora_dist.training.trainer

# A mesh opens process groups, and a group's threads wake up 100 times a second for as long as the
# process lives. A rank of the tests trains hundreds of times: all its runs share the meshes.
# The module only imports the name, and the cache's type accepts any arguments.
scalora_dist.engines.fsdp.init_device_mesh = functools.cache(  # type: ignore[assignment,attr-defined]
    init_device_mesh
)
