"""Measures the milliseconds of Python that one rank spends in a rescale, at any number of ranks.

    python tools/time_rescale_host.py [--ranks 1024 --sharding zero3 --rank 8 --rounds 5]

A GPU works while the host runs ahead of it. So what the host does between torch's operators is free,
if it is less than the GPU's work, and else decides the speed. This tool builds one rank's real
shards of Gemma-3-12B's 336 projections on the CPU, for a group of any size, and runs the rescale.
It reports the time outside of torch's operators. The other ranks do not exist: their messages are
this rank's own memory. The solve, which runs in torch's operators, gives α = β = 1. A merge calls
the operator that is one Triton kernel on a GPU; here it does nothing, so its launch is not timed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
