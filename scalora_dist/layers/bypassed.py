"""Finds linear layers whose weight the model multiplies itself, past the layer's own forward.

Mamba's mixer computes ``dt_proj.weight @ x``; its GPU kernels take the weights of ``x_proj`` and
``out_proj`` too. A and B of such a layer have no effect: they would count as trained and stay 0.

There are two ways to find them, and both are used. A watched forward shows every such product,
however it is written, but only on the path that this machine takes. The model's code shows what it
gives to the kernels of other machines.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import logging
import textwrap
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

TOKENS = 4  # of the watched forward
STORED = 2**12  # largest number of elements of a weight that are stored, see `_ones`
ShapeOf: TypeAlias = Callable[[Tensor], torch.Size]
logger = logging.getLogger(__name__)


def find_bypassed(
    model: PreTrainedModel,
    layers: Collection[nn.Linear],
    experts: Collection[nn.Module],
    shape_of: ShapeOf,
) -> set[nn.Linear]:
    """Those of ``layers`` whose weight the model multiplies itself.

    The result is the same on every rank and with every engine. A layer that is only not called, as
    an expert without tokens, is not in it.

    Args:
        layers: layers of the model whose forward is nn.Linear's, or a 4-bit one.
        experts: modules with fused expert weights. Their products are skipped to save time.
        shape_of: gives a parameter's full shape. The values are not used, so the parameter may be
            sharded or on the meta device.
    """
    modules = dict(model.named_modules())
    given_away = {kind: _given_away(kind) for kind in {type(x) for x in modules.values()}}
    named = {f"{n}.{child}" for n, x in modules.items() for child in given_away[type(x)]}
    found = {modules[name] for name in named if name in modules}
    for skipped in dict.fromkeys((tuple(experts), ())):  # without skipping any, if that fails
        try:
            found |= _watched(model, layers, skipped, shape_of)
            break
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
    else:
        logger.warning(
            "a forward of %s on the CPU fails (%s): which layers it bypasses is read from its code",
            type(model).__name__,
            reason,
        )
    return {layer for layer in layers if layer in found}


# --- the watched forward -------------------------------------------------------------------------


class _Weightless(nn.Linear):
    """A layer whose output has the right shape and does not depend on its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return input[..., :1].expand(*input.shape[:-1], self.out_features).clone()


class _Passing(nn.Module):
    """Experts that return their first input, which has the shape of their output.

    In the graph the output depends on the other inputs too: a router's weight may be bypassed.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        others = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        return hidden_states + sum(0 * x.sum() for x in others if x.is_floating_point())


def _watched(
    model: PreTrainedModel,
    layers: Collection[nn.Linear],
    experts: Collection[nn.Module],
    shape_of: ShapeOf,
) -> set[nn.Linear]:
    """The layers whose weight gets a gradient although their forward does not use it.

    Runs a few tokens on the CPU with stand-ins for all weights, and walks the backward's graph.
    """
    weights = {x: _ones((x.out_features, x.in_features), x.weight.dtype) for x in layers}
    of_layers = {id(layer.weight): weight for layer, weight in weights.items()}
    stand_ins: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        own = of_layers.get(id(p))
        stand_ins[name] = _ones(shape_of(p), p.dtype) if own is None else own.requires_grad_()
    for name, buffer in model.named_buffers():
        meta = buffer.is_meta
        stand_ins[name] = torch.zeros_like(buffer, device="cpu") if meta else buffer.cpu().clone()
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64)
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.can_generate():
        inputs["use_cache"] = False
    stubs: list[tuple[nn.Module, type[nn.Module]]] = [(layer, _Weightless) for layer in layers]
    stubs += [(module, _Passing) for module in experts]
    with _set_to_be_watched(model, stubs):
        output = functional_call(model, stand_ins, kwargs=inputs)
    used = {id(leaf) for leaf in _leaves(output)}
    return {layer for layer, weight in weights.items() if id(weight) in used}


def _ones(shape: Collection[int], dtype: torch.dtype) -> Tensor:
    """Ones (shape) on the CPU. Integers, as 4-bit codes, become float32.

    Large ones are one stored number, so that a model of any size takes no memory. Small ones are
    stored, because Gemma-3n clamps some of its weights in place.
    """
    size = torch.Size(shape)
    stored = size if size.numel() <= STORED else ()
    return torch.ones(stored, dtype=dtype if dtype.is_floating_point else torch.float32).expand(
        size
    )


@contextmanager
def _set_to_be_watched(
    model: PreTrainedModel, stubs: list[tuple[nn.Module, type[nn.Module]]]
) -> Iterator[None]:
    """Set training mode, attention and experts that run everywhere, and the classes in ``stubs``.

    Restores everything, the random state too.
    """
    classes = [(module, type(module)) for module, _ in stubs]
    modes = [(module, module.training) for module in model.modules()]
    configs = [getattr(module, "config", None) for module in model.modules()]
    found = {id(c): c for c in configs if isinstance(c, PreTrainedConfig)}
    chosen = [(c, c._attn_implementation, c._experts_implementation) for c in found.values()]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(0)  # a model may skip blocks at random
        try:
            model.train()
            for config, *_ in chosen:
                config._attn_implementation = config._experts_implementation = "eager"
            for module, stub in stubs:
                module.__class__ = stub
            yield
        finally:
            for module, kind in classes:
                module.__class__ = kind
            for config, attention, experts in chosen:  # the model's own first: it sets its parts'
                config._attn_implementation = attention
                config._experts_implementation = experts
            for module, mode in modes:
                module.training = mode


def _leaves(output: Any) -> Iterator[Tensor]:
    """The tensors that a backward from all of ``output`` computes a gradient for."""
    tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
    nodes: set[Any] = {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            yield node.variable
        following = {after for after, _ in node.next_functions if after is not None} - nodes
        nodes |= following
        waiting += following


# --- the model's code ----------------------------------------------------------------------------


def _given_away(kind: type[nn.Module]) -> set[str]:
    """Submodules whose weight a forward in the code of ``kind`` gives to a function or operator.

    Only a whole weight counts. Parts (``weight[:, :n]``) are for settings that are never trained.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # the class is in no file
        return set()
    found = set()
    for function in ast.walk(tree):
        # Some models have a cuda_kernels_forward. Other functions initialize weights.
        if isinstance(function, ast.FunctionDef) and "forward" in function.name:
            for operand in (x for node in ast.walk(function) for x in _operands(node)):
                if isinstance(operand, ast.Attribute) and operand.attr == "weight":
                    found.add(ast.unparse(operand.value).removeprefix("self."))
    return found


def _operands(node: ast.AST) -> list[ast.expr]:
    """What an operator or a function computes with, [] for any other node."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if not isinstance(node, ast.Call):
        return []
    function = node.func
    if isinstance(function, ast.Name) and hasattr(builtins, function.id):  # isinstance(…)
        return []
    if isinstance(function, ast.Attribute) and function.attr in ("to", "type_as"):  # reads a dtype
        return []
    return [*node.args, *(keyword.value for keyword in node.keywords)]
