"""Builds a method's model without storage, lists its parameters and traces one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from scalora_dist.config.method import MethodArguments
from scalora_dist.config.options import Options
from scalora_dist.layers.adapted_linear import LowRankLinear, adapted_linear, own_parameters
from scalora_dist.layers.fourbit_linear import FourBitLinear
from scalora_dist.layers.target_modules import ALL_LINEAR, decoder_blocks
from scalora_dist.methods.method import AddContext
from scalora_dist.methods.registry import METHODS
from scalora_dist.modeling.load import BaseModelSpec, load_model, quiet
from scalora_dist.modeling.tables import tables_of
from scalora_dist.planning.residency import Part, Weight
from scalora_dist.planning.trace import Trace, trace_micro_batch
from scalora_dist.training.optimizer import make_optimizer


@dataclass(frozen=True)
class Traced:
    """The parameters and the trace of a model with a method's layers.

    Attributes:
        weights: every parameter once, in model order.
        buffers: bytes of the buffers, which every rank has in full.
        trace: trace of one micro-batch.
        length: tokens of each of its sequences.
        blocks: names of the decoder blocks.
        head: the LM head's name, or "".
        shapes: (m, n) of the weight of each layer with factors A and B.
    """

    weights: list[Weight]
    buffers: int
    trace: Trace
    length: int
    blocks: list[str]
    head: str
    shapes: list[tuple[int, int]]


def trace_model(options: Options, base: BaseModelSpec, compute: torch.dtype) -> Traced:
    """Build the model with the method's layers, and trace one micro-batch at ``max_length``.

    Its sequences are shorter if the model has no positions for so many tokens.

    Args:
        options: the resolved options.
        base: facts about the base model.
        compute: dtype that the engine computes in.

    Raises:
        UserError: the trainer would refuse this model, method or these options.
    """
    train, method = options.train, METHODS[options.method.name]
    with quiet():
        model, args = _make(options, base, compute)
        length = tables_of(model).longest(options.data.max_length)
        for module in model.modules():
            if isinstance(module, FourBitLinear):
                # mypy allows no assignment to a method.
                module.dense = partial(_dense, module)  # type: ignore[method-assign]
        layers = method.add(model, AddContext(args, train.seed, compute))
        if train.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        make_optimizer(method, options, trained)
    adapted = {id(adapted_linear(x).weight) for x in layers.values()}
    merged = adapted if method.merges and args.merge_target == "weight" else set()
    edited = adapted if method.edits_weights and args.merge_target != "carry" else set()
    added = {id(p) for layer in layers.values() for p in own_parameters(layer).values()}
    modules = {id(p): name for name, x in model.named_modules() for p in x.parameters(False)}
    weights = []
    for name, p in model.named_parameters():
        part: Part = "base"
        if id(p) in added:
            part = "carry" if name.endswith((".C", ".D")) else "adapters"
        stored = train.dtype.itemsize if p.is_floating_point() else p.dtype.itemsize
        splits = part == "carry" or (id(p) in merged and args.merge_rounding == "split")
        weights.append(
            Weight(
                name=name,
                module=modules[id(p)],
                shape=tuple(p.shape),
                itemsize=p.dtype.itemsize,
                stored=stored,
                trained=p.requires_grad,
                part=part,
                merged=id(p) in merged,
                low=torch.int16.itemsize if splits and stored == 2 else 0,
                saved=p.requires_grad or id(p) in added or id(p) in edited,
            )
        )
    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    return Traced(
        weights=weights,
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        trace=trace_micro_batch(
            model,
            train.per_device_train_batch_size,
            length,
            offloads=train.activation_offloading,
        ),
        length=length,
        blocks=[*decoder_blocks(model)],
        head=names.get(id(head), ""),
        shapes=[
            (layer.out_features, layer.in_features)
            for layer in layers.values()
            if isinstance(layer, LowRankLinear)
        ],
    )


def trace_frozen_model(options: Options, base: BaseModelSpec, compute: torch.dtype) -> Trace:
    """The same of the model without a method's layers: its backward ends at the embeddings.

    What ``trace_model`` has more is due to the method's layers.
    """
    train = options.train
    with quiet():
        model, _ = _make(options, base, compute)
        model.requires_grad_(False)
        model.enable_input_require_grads()
        if train.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        length = tables_of(model).longest(options.data.max_length)
    return trace_micro_batch(model, train.per_device_train_batch_size, length)


def _make(
    options: Options, base: BaseModelSpec, dtype: torch.dtype
) -> tuple[PreTrainedModel, MethodArguments]:
    """The model, and the method's options with the layers that an encoder adapts."""
    name = options.model.model_name_or_path
    config = AutoConfig.from_pretrained(name, **options.model.source)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or base.fourbit:
        return load_model(options.model, base, dtype, weights=False), options.method
    with init_empty_weights():  # an encoder, with the head for GLUE's tasks
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    if options.method.target_modules == [ALL_LINEAR]:  # all except that head
        linear = {n.split(".")[-1] for n, x in model.named_modules() if type(x) is nn.Linear}
        return model, replace(options.method, target_modules=sorted(linear - {"classifier"}))
    return model, options.method


def _dense(layer: FourBitLinear, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty W (m, n) instead of the dequantized one: a traced layer's codes have no values."""
    return codes.new_empty(layer.out_features, layer.in_features, dtype=dtype)
