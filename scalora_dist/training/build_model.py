"""Builds the model that an engine trains: loads the base model, adds layers, shards it."""

from __future__ import annotations

import logging
import zlib
from functools import partial

from transformers import PreTrainedModel, set_seed

from scalora_dist.config.options import Options
from scalora_dist.distributed.world import World
from scalora_dist.engines.base import Engine
from scalora_dist.errors import UserError
from scalora_dist.layers.target_modules import decoder_blocks
from scalora_dist.methods.method import AddContext, Method
from scalora_dist.model_io.import_adapter import SavedAdapter
from scalora_dist.modeling.compiled_blocks import check_compiler, compile_blocks
from scalora_dist.modeling.hub_files import fetch_weights
from scalora_dist.modeling.load import BaseModelSpec, load_model
from scalora_dist.modeling.offloaded_activations import offload_activations
from scalora_dist.training.optimizer import make_optimizer

logger = logging.getLogger(__name__)


def check_same_attention(base: BaseModelSpec, world: World) -> None:
    """Check that all nodes use the same attention implementation: one all-reduce.

    Raises:
        UserError: on every rank, where nodes would load the model with different attention.
    """
    if not world.agree(zlib.crc32(str(base.attention).encode())):
        raise UserError(
            "flash-attn is installed on some nodes only: install it on all, or set "
            "--attn_implementation sdpa"
        )


def build_model(
    options: Options,
    base: BaseModelSpec,
    method: Method,
    engine: Engine,
    saved_adapter: SavedAdapter | None,
) -> PreTrainedModel:
    """Load the model, add the method's layers, and let ``engine`` shard it. A collective.

    Afterwards each rank has its own random seed, so that dropout differs between ranks.

    Raises:
        UserError: the method cannot adapt a layer, or ``saved_adapter`` does not fit the layers.
    """
    world = engine.world
    reads_weights = world.is_main or not engine.loads_on_rank_0
    device = world.device if engine.keeps_whole_weights else None

    def load() -> PreTrainedModel:
        return load_model(options.model, base, engine.dtype, weights=reads_weights, device=device)

    if not engine.loads_on_rank_0:
        world.node_first(lambda: fetch_weights(options.model))
    with engine.loading():
        model = world.node_first(load) if engine.loads_on_rank_0 else load()
        context = AddContext(options.method, options.train.seed, engine.dtype, engine.shape_of)
        layers = method.add(model, context)
    if saved_adapter:
        saved_adapter.check(layers)
    set_seed(options.train.seed + world.rank)  # Python's, numpy's and torch's generators
    if options.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = decoder_blocks(model)  # FSDP2 renames their classes
    engine.attach(model, layers, partial(make_optimizer, method, options))
    if options.train.torch_compile:
        check_compiler(world)
        compile_blocks(blocks.values())
    if options.train.activation_offloading:
        whole = [*blocks.values(), *layers.values()]
        offload_activations(model, whole, world.device, inside=not options.train.torch_compile)
    return model
