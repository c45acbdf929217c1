"""Compiles the decoder blocks of a model with torch.compile, each by itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

import torch
from torch import nn

from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError

# Graphs of one block's forward. Evaluation, the first block and the others have one each, for each
# kind of attention, first for one length and then for all. Beyond the limit torch would silently
# not compile. Its own limit is 8.
GRAPHS = 64


def check_compiler(world: World) -> None:
    """Check that torch finds the C++ compiler that it needs on CPUs. A collective.

    Raises:
        UserError: on every rank, where one rank has no compiler.
    """
    here = world.device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")) is not None
    (missing,) = world.max(float(not here))
    if missing:
        raise UserError(
            "--torch_compile needs a C++ compiler on CPUs: install g++, or leave it out"
        )


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Let each block's next forward compile it. Called after an engine has sharded the model.

    Equal blocks share what was compiled. An engine's hooks on a block stay outside, so FSDP2
    gathers a block's parameters before the compiled code begins. Parameters are its inputs: it
    reads merged weights. Gradient checkpointing is inside. Of another length of batch torch
    compiles a second time, then for all lengths.

    Raises:
        UserError: there are no blocks.
    """
    blocks = list(blocks)
    if not blocks:
        raise UserError("the model names no decoder blocks to compile: leave out --torch_compile")
    torch._dynamo.config.recompile_limit = GRAPHS
    for block in blocks:
        # Not `block.compile()`: it would compile the hooks with the forward.
        block.forward = torch.compile(block.forward)
