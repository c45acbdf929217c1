"""Exports what a run has trained, as a model and as an adapter, from an engine's shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from scalora_dist.config.model import ModelArguments
from scalora_dist.config.options import Options
from scalora_dist.methods.registry import writes_adapter
from scalora_dist.methods.runner import MethodRunner
from scalora_dist.model_io.base_weights import BaseWeights
from scalora_dist.model_io.export_adapter import AdapterExport
from scalora_dist.model_io.export_model import ModelExport, send_model
from scalora_dist.model_io.parameters import EngineParameters


class Exports:
    """Exports the model and the adapter. Both are planned before the first step.

    Attributes:
        engine: the engine with the sharded model.
        adapter: writes the adapter; None: the run has none.
        model: writes the model; on rank 0 only, and None without ``--save_model``.
        gathered: the parameters that rank 0 gathers for the model, the same on every rank.
    """

    def __init__(self, runner: MethodRunner, options: Options, model: ModelArguments) -> None:
        """
        Args:
            runner: the runner of the method. Its engine must hold the weights as loaded.
            options: the run's options, as exports record them.
            model: the options to read the base model by.

        Raises:
            UserError: on every rank, where the base model's files cannot be read again.
        """
        self.engine = engine = runner.engine
        self.low_halves: Mapping[str, Tensor] = runner.low_halves
        train = options.train
        base: BaseWeights | None = None

        def read() -> BaseWeights:
            return BaseWeights(model, engine.dtype).opened()

        def plan() -> tuple[ModelExport, list[str]]:
            export = ModelExport(base or read(), engine.dtype)
            return export, export.gathered(parameters, dict(engine.model.named_buffers()))

        if train.adapter_rank:
            base = engine.world.node_first(read)
        self.adapter = AdapterExport(options, base) if writes_adapter(options) else None
        if self.adapter and self.adapter.before:
            weights = {f"{x.name}.weight": x.W for x in engine.layer_shards(gradients=False)}
            self.adapter.before.check(weights, engine.world)
        parameters = EngineParameters(engine, self.low_halves)
        self.model = None
        gathered: list[list[str]] = [[]]
        if train.save_model:
            if planned := engine.world.main_only(plan):  # on rank 0
                self.model, gathered = planned[0], [planned[1]]
            dist.broadcast_object_list(gathered, src=0)
        (self.gathered,) = gathered

    def write_adapter(self, folder: Path, card: str) -> bool:
        """Write the adapter, if this run has one. Collective. Returns whether it has one.

        Args:
            folder: folder of the adapter; replaced if it exists.
            card: text of README.md.
        """
        if self.adapter:
            parameters = EngineParameters(self.engine, self.low_halves)
            self.adapter.write(folder, parameters, card)
        return self.adapter is not None

    def write_model(self, folder: Path, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
        """Write the merged model. Collective.

        Args:
            folder: folder of the model; replaced if it exists.
            tokenizer: saved beside the model.
            card: text of README.md.
        """
        parameters = EngineParameters(self.engine, self.low_halves)
        if self.model:
            buffers = dict(self.engine.model.named_buffers())
            self.model.write(folder, parameters, self.gathered, buffers, tokenizer, card)
        else:
            send_model(self.gathered, parameters)
