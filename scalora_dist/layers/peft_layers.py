"""Puts PEFT's layers into a model, initializes them and merges them.

PEFT wraps a linear layer and keeps A as ``lora_B.default.weight`` (m, r) and Bᵀ as
``lora_A.default.weight`` (r, n). A saved adapter has these names without ``default``; the code that
writes and reads adapters does not need PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scalora_dist.config.method import MethodArguments
from scalora_dist.errors import UserError
from scalora_dist.layers.bypassed import ShapeOf
from scalora_dist.layers.lora_init import lora_init
from scalora_dist.layers.target_modules import inject, own_shape

Kind = Literal["lora", "dora", "hira"]
ADAPTER = "default"


def add_peft_layers(
    model: PreTrainedModel,
    args: MethodArguments,
    kind: Kind,
    *,
    seed: int,
    directions: int = 1,
    shape_of: ShapeOf = own_shape,
) -> dict[str, nn.Module]:
    """Freeze ``model`` and let PEFT wrap its target layers. Returns {original name: wrapper}.

    For lora and dora, B starts as in ``lora_init``. hira starts as in PEFT, the same on all ranks.
    ``directions`` and ``shape_of`` are as for ``inject``.

    Raises:
        UserError: PEFT is not installed; what ``inject`` refuses.
    """
    peft = _peft()
    targets = inject(
        model,
        args.target_modules,
        args.rank,
        lambda _, linear: linear,
        directions=directions,
        shape_of=shape_of,
    )
    config = _config(kind, list(targets), args)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in targets}
    for name, layer in layers.items():
        layer.peft_config = config  # for `merged_by_peft`
        if kind != "hira":
            m, n = layer.out_features, layer.in_features
            _, b = lora_init(name, m, n, args.rank, seed=seed, dtype=torch.float32)
            parameter = layer.get_parameter(f"lora_A.{ADAPTER}.weight")
            if not parameter.is_meta:
                parameter.data.copy_(b.T)
    return layers


def _config(kind: Kind, names: Sequence[str], args: MethodArguments) -> Any:
    peft = _peft()
    if kind == "hira":
        return peft.HiraConfig(
            r=args.rank, hira_dropout=args.lora_dropout, target_modules=list(names)
        )
    return peft.LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=list(names),
        use_dora=kind == "dora",
    )


def merged_by_peft(layer: Any, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """W (m, n) as PEFT merges it, float32.

    The merge is done in a separate layer, because the model's layer is sharded over ranks.

    Args:
        layer: PEFT's wrapper in the model.
        weight: full W (m, n) float32; it is overwritten.
        own: the wrapper's own parameters by name, full, float32.
    """
    holder = nn.Module()
    holder.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    holder.layer.weight.data = weight
    config = type(layer.peft_config)(
        **(layer.peft_config.to_dict() | {"target_modules": ["layer"], "inference_mode": False})
    )
    twin = _peft().inject_adapter_in_model(config, holder, adapter_name=ADAPTER).layer
    for name, parameter in twin.named_parameters():
        if name in own:
            parameter.data = own[name]
    twin.merge()
    return twin.base_layer.weight.data


def factor_names(layer: str) -> tuple[str, str]:
    """Names of the parameters of a wrapped layer that hold A (m, r) and Bᵀ (r, n)."""
    return f"{layer}.lora_B.{ADAPTER}.weight", f"{layer}.lora_A.{ADAPTER}.weight"


def factor_scaling(layer: Any) -> float:
    """s of a layer that PEFT's LoRA wraps."""
    return layer.scaling[ADAPTER]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "this --method is PEFT's: pip install 'scalora_dist[peft]', or choose another"
        ) from error
    return peft
