"""PEFT's layers in our trainer, and its adapters' format: the one place that speaks PEFT's names.

PEFT wraps a linear layer and keeps A as ``lora_B.default.weight`` (m, r) and Bᵀ as
``lora_A.default.weight`` (r, n); a saved adapter has them without ``default``. What is written and
read of adapters does not need PEFT.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scalora_dist.adapters.init import lora_init
from scalora_dist.adapters.inject import inject
from scalora_dist.config import MethodArguments
from scalora_dist.errors import UserError

Kind = Literal["lora", "dora", "hira"]
ADAPTER = "default"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of a saved adapter's keys, before the model's own names
# Settings of a LoRA adapter with which it is more than s·A Bᵀ beside linear layers.
MORE_THAN_LORA = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "kasa_config",
)
# Starts that take from W what they put into A and B.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def add_peft_layers(
    model: PreTrainedModel, args: MethodArguments, kind: Kind, *, seed: int, directions: int = 1
) -> dict[str, nn.Module]:
    """Freeze ``model`` and let PEFT wrap its target layers; {name the layer had: wrapper}.

    lora and dora start at our B (see ``lora_init``), hira where PEFT starts it, alike on all ranks.
    ``directions`` as for ``inject``.

    Raises:
        UserError: PEFT is not installed; what ``inject`` refuses.
    """
    peft = _peft()
    targets = inject(
        model, args.target_modules, args.rank, lambda _, linear: linear, directions=directions
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
    """W as PEFT merges it, from W (m, n) and the wrapper's own parameters, all whole and float32.

    In a layer of one's own, for the model's is cut up over ranks. ``weight`` is used up.
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
    """The parameters of a wrapped layer that are A (m, r) and Bᵀ (r, n)."""
    return f"{layer}.lora_B.{ADAPTER}.weight", f"{layer}.lora_A.{ADAPTER}.weight"


def factor_scaling(layer: Any) -> float:
    """s of a layer that PEFT's LoRA wraps."""
    return layer.scaling[ADAPTER]


def saved_names(layer: str) -> tuple[str, str]:
    """A saved adapter's keys for a layer's A (m, r) and Bᵀ (r, n)."""
    return f"{PREFIX}{layer}.lora_B.weight", f"{PREFIX}{layer}.lora_A.weight"


def layer_of(key: str) -> str | None:
    """The layer that a saved A or Bᵀ belongs to; None: the key is of something else."""
    found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_[AB]\.weight", key)
    return found and found[1]


def saved_config(
    base: str, modules: Collection[str], ranks: Mapping[str, int], scalings: Mapping[str, float]
) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter on the model ``base``.

    Args:
        modules: the names of all modules of the model.
        ranks, scalings: {layer: r} and {layer: s}.
    """
    alphas = {layer: _number(scalings[layer] * rank) for layer, rank in ranks.items()}
    (rank, _), (alpha, _) = (Counter(x.values()).most_common(1)[0] for x in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": shortest_names(ranks, modules),
        "r": rank,
        "rank_pattern": {layer: r for layer, r in ranks.items() if r != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {layer: a for layer, a in alphas.items() if a != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


def shortest_names(layers: Collection[str], modules: Collection[str]) -> list[str]:
    """The layers' last name components, if no other module is called so; else their names."""
    suffixes = {layer.rpartition(".")[2] for layer in layers}
    selected = {name for name in modules if name.rpartition(".")[2] in suffixes}
    return sorted(suffixes) if selected == set(layers) else list(layers)


def saved_scaling(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """s of a layer of a saved adapter."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):  # as PEFT does
            alpha = value
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def not_plain_lora(config: Mapping[str, Any]) -> str | None:
    """Why a saved adapter is not s·A Bᵀ beside the linear layers of its base, or None."""
    if config.get("peft_type") != "LORA":
        return f"has peft_type {config.get('peft_type')}"
    if config.get("bias", "none") != "none":
        return f"has bias {config['bias']}"
    for name in MORE_THAN_LORA:
        if config.get(name):
            return f"has {name}"
    if str(start := config.get("init_lora_weights")).startswith(CHANGE_THE_BASE):
        return f"has init_lora_weights {start}, which changed its base"
    return None


def _number(value: float) -> float | int:
    """Without the last digits' rounding; whole numbers, which other readers ask for, as such."""
    rounded = float(f"{value:.12g}")
    return int(rounded) if rounded.is_integer() else rounded


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "this --method is PEFT's: pip install 'scalora_dist[peft]', or choose another"
        ) from error
    return peft
