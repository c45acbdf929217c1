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
# not compile. Its own limit is 8. This one is for the whole process and stays, because torch reads
# it whenever it compiles, and that is in any later forward.
GRAPHS = 64
torch._dynamo.config.recompile_limit = GRAPHS


def check_compiler(world: World) -> None:
    """Check that there is the compiler that torch needs: for C++ on CPUs, for C on GPUs.

    A collective.

    Raises:
        UserError: on every rank, where one rank has no compiler.
    """
    if world.device.type == "cpu":
        language, where, names = "C++", "CPUs", [os.environ.get("CXX", "g++")]
    else:  # for Triton
        language, where = "C", "GPUs"
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    (missing,) = world.max(float(not any(map(shutil.which, names))))
    if missing:
        raise UserError(
            f"--torch_compile needs a {language} compiler on {where}: install "
            f"{'g++' if language == 'C++' else 'gcc'}, or leave it out"
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
    for block in blocks:
        # Not `block.compile()`: it would compile the hooks with the forward.
        block.forward = torch.compile(block.forward)
