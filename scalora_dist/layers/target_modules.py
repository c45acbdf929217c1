"""Selects the layers of a model that a method adapts, and refuses those that cannot be adapted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scalora_dist.errors import UserError
from scalora_dist.layers.bypassed import ShapeOf, find_bypassed
from scalora_dist.layers.fourbit_linear import FourBitLinear

ALL_LINEAR = "all-linear"
ADAPTABLE = (nn.Linear, FourBitLinear)
logger = logging.getLogger(__name__)
L = TypeVar("L", bound=nn.Module)


def own_shape(p: Tensor) -> torch.Size:
    """The shape of a parameter that is not sharded."""
    return p.shape


def inject(
    model: PreTrainedModel,
    target_modules: Sequence[str],
    rank: int,
    adapt: Callable[[str, nn.Linear], L],
    *,
    directions: int = 1,
    shape_of: ShapeOf = own_shape,
) -> dict[str, L]:
    """Freeze ``model`` and ``adapt`` each target layer; returns {name: layer} in model order.

    Args:
        target_modules: module-name suffixes ("q_proj", "mlp.up_proj"), or ``["all-linear"]``: every
            nn.Linear but the LM head. In a multimodal model, only its language model.
        rank: rank r of the adapters.
        adapt: function (name, linear) → the layer that takes its place.
        directions: number of a layer's min(m, n) directions that each column of a factor takes.
        shape_of: function that returns a parameter's full shape; an engine may have sharded the
            parameter while it was loaded.

    Raises:
        UserError: a target that does not exist or cannot be adapted, a rank that does not fit, a
            model that multiplies 4-bit weights itself.
    """
    model.requires_grad_(False)
    survey = _Survey(model, shape_of)
    every = list(target_modules) == [ALL_LINEAR]
    targets = survey.all_linear() if every else survey.by_suffix(target_modules)
    for name, module in survey.modules.items():
        if isinstance(module, FourBitLinear) and module in survey.bypassed:
            raise UserError(
                f"the model multiplies the weight of {name} itself, and 4-bit codes are no matrix: "
                "load the model unquantized"
            )
    limits = {n: min(t.out_features, t.in_features) // directions for n, t in targets.items()}
    narrowest = min(limits, key=lambda name: limits[name])
    if not 1 <= rank <= limits[narrowest]:
        raise UserError(
            f"rank {rank} does not fit {narrowest}: set --rank between 1 and {limits[narrowest]}, "
            "or leave such layers out of --target_modules"
        )
    return {name: adapt(name, linear) for name, linear in targets.items()}


def reached_by_text(model: PreTrainedModel) -> set[nn.Module]:
    """The modules that a forward on text can reach: all, or a multimodal model's language model."""
    if model.config.get_text_config() is model.config:
        return set(model.modules())
    return {*model.get_decoder().modules(), model.get_output_embeddings()}


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """{name: decoder block} in model order: the modules of ``_no_split_modules`` in transformers.

    Blocks inside another block (Mamba's mixers) are left out. So are blocks that text does not
    reach (a vision tower's).
    """
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    reached = reached_by_text(model) if isinstance(model, PreTrainedModel) else {*model.modules()}
    blocks: dict[str, nn.Module] = {}
    outer = "."
    for name, module in model.named_modules():
        inside = f"{name}.".startswith(outer)
        if type(module).__name__ in kinds and module in reached and not inside:
            blocks[name], outer = module, f"{name}."
    return blocks


class _Survey:
    """A model's modules, and which of them can carry A and B."""

    def __init__(self, model: PreTrainedModel, shape_of: ShapeOf) -> None:
        self.model = model
        self.shape_of = shape_of
        self.modules = dict(model.named_modules())
        self.head = model.get_output_embeddings()
        self.reached = reached_by_text(model)
        owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        self.shared = {parameter for parameter, count in owners.items() if count > 1}

    @cached_property
    def bypassed(self) -> set[nn.Module]:
        """The layers whose weight the model multiplies itself."""
        every = self.modules.values()
        layers = [x for x in every if type(x) in ADAPTABLE]
        experts = [x for x in every if self._fused_experts(x)]
        return {*find_bypassed(self.model, layers, experts, self.shape_of)}

    def all_linear(self) -> dict[str, nn.Linear]:
        targets, skipped = {}, {}
        for name, module in self.modules.items():
            if module not in self.reached:
                continue
            reason = self.why_not(name, module)
            if isinstance(module, Conv1D) or self._fused_experts(module):
                raise UserError(
                    f"{reason}; --target_modules all-linear would leave it out silently"
                )
            if isinstance(module, nn.Linear) and module is not self.head:
                if reason:
                    skipped[name] = reason
                else:
                    targets[name] = module
        if not targets:
            reason = next(iter(skipped.values()), "the model has no nn.Linear besides its LM head")
            raise UserError(f"--target_modules all-linear finds nothing to adapt: {reason}")
        if skipped:
            bypassed = sum(self.modules[name] in self.bypassed for name in skipped)
            logger.warning(
                "all-linear leaves out %d layers%s: %s",
                len(skipped),
                f" ({bypassed} whose weight the model or its GPU kernels multiply themselves)"
                if bypassed
                else "",
                "; ".join(skipped),
            )
        return targets

    def by_suffix(self, suffixes: Sequence[str]) -> dict[str, nn.Linear]:
        targets = {}
        for suffix in suffixes:
            matches = {
                name: module
                for name, module in self.modules.items()
                if name == suffix or name.endswith(f".{suffix}")
            }
            if not matches:
                known = {
                    n.split(".")[-1] for n, m in self.modules.items() if not self.why_not(n, m)
                }
                raise UserError(
                    f"--target_modules {suffix}: the model has no module of this name; "
                    f"its linear layers are called {', '.join(sorted(known)) or 'nothing at all'}"
                )
            # A vision tower has a q_proj, too, which is left out.
            inside = {n: module for n, module in matches.items() if module in self.reached}
            for name, module in (inside or matches).items():
                if reason := self.why_not(name, module):
                    raise UserError(f"--target_modules {suffix}: {reason}")
                targets[name] = module
        return {name: targets[name] for name in self.modules if name in targets}  # model order

    def why_not(self, name: str, module: nn.Module) -> str | None:
        """Why a module cannot carry A and B, as half a sentence that says what to set; or None."""
        if module not in self.reached:
            return f"{name} is no part of the language model, and no text reaches it: leave it out"
        if module is self.head:
            return f"{name} is the LM head; leave it out"
        if isinstance(module, Conv1D):
            return f"{name} is a Conv1D (GPT-2's transposed layer): target nn.Linear layers"
        if self._fused_experts(module):
            return f"{name} holds fused 3-D expert weights: target 2-D layers (q_proj …)"
        if not isinstance(module, nn.Linear):
            return f"{name} is a {type(module).__name__}, not an nn.Linear: name linear layers"
        quantized = isinstance(module, FourBitLinear)
        if not quantized and not module.weight.is_floating_point():
            return f"{name} is quantized to {module.weight.dtype}: load the model unquantized"
        if isinstance(module.weight, DTensor):
            return f"{name} is tensor-parallel: load the model without a tp_plan"
        if type(module) not in ADAPTABLE:
            return f"{name} is a {type(module).__name__} with a forward of its own: leave it out"
        if id(module.weight) in self.shared:
            return f"{name} shares its weight, and a merge would change both: leave it out"
        if module in self.bypassed:
            return (
                f"{name} is bypassed, as the model or its GPU kernels multiply the weight "
                "themselves, without A and B: leave it out"
            )
        return None

    def _fused_experts(self, module: nn.Module) -> bool:
        shapes = [self.shape_of(p) for p in module.parameters(recurse=False)]
        return "expert" in type(module).__name__.lower() and any(len(x) == 3 for x in shapes)
