"""The description of a method: one entry of the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from scalora_dist.config.method import MethodArguments
from scalora_dist.config.options import Options
from scalora_dist.engines.base import Engine
from scalora_dist.layers.bypassed import ShapeOf
from scalora_dist.layers.target_modules import own_shape
from scalora_dist.methods.init.initialization import Initialization
from scalora_dist.methods.merger import Merger
from scalora_dist.methods.transform import Restart, Transform

Layers: TypeAlias = Mapping[str, nn.Module]  # {name: adapted layer} in model order


@dataclass(frozen=True)
class AddContext:
    """The inputs with which a method adds its layers to a model.

    Attributes:
        args: the options of the method.
        seed: the seed of the initial values.
        dtype: the dtype of the added parameters.
        shape_of: gives the full, unsharded shape of a parameter (``Engine.shape_of``).
    """

    args: MethodArguments
    seed: int
    dtype: torch.dtype
    shape_of: ShapeOf = own_shape


AddLayers: TypeAlias = Callable[[PreTrainedModel, AddContext], Layers]


@dataclass(frozen=True)
class Method:
    """One method of the papers. Which options it reads is declared with the options.

    Attributes:
        add: puts its layers into a model and sets ``requires_grad`` of what is trained.
        initialize: sets the added parameters after the model is sharded. It may edit W.
        transform: makes, once, the transform that runs between backward and optimizer step.
        restart: makes, once, the restart that runs between two steps.
        edits_weights: whether its initialization or its merges change a W that is not trained. If
            they do, checkpoints hold W.
        merges: whether it merges while training, and needs a Merger.
        own_factors: whether its layers hold A and B, or a core between them. They are the adapter
            at the end of a run, if W does not change besides.
        needs_dense: whether it reads, trains or edits W as numbers. Then it cannot train a 4-bit
            base model.
        rate: the factor on the learning rate of a trained parameter, by its name.
    """

    add: AddLayers
    initialize: Callable[[Initialization], None] | None = None
    transform: Callable[[Engine, Merger | None, Options], Transform] | None = None
    restart: Callable[[Merger, MethodArguments, int], Restart] | None = None
    edits_weights: bool = False
    merges: bool = False
    own_factors: bool = True
    needs_dense: bool = False
    rate: Callable[[str, MethodArguments], float] = lambda name, args: 1.0
