"""PEFT's file format of a LoRA adapter: tensor names and adapter_config.json. Needs no PEFT."""

from __future__ import annotations

import re
import reprlib
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from scalora_dist.model_io.name_patterns import NamePattern

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


PREFIX = "base_model.model."  # prefix of a saved adapter's keys, before the model's own names


# Settings that make a LoRA adapter more than s·A Bᵀ on linear layers.
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


# Characters of all keys of alpha_pattern. A name of 1000 layers takes some 100.
LONGEST_PATTERNS = 100_000
# Initializations that subtract s·A Bᵀ from W, and so change the base model.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def saved_names(layer: str) -> tuple[str, str]:
    """The keys of a layer's A (m, r) and Bᵀ (r, n) in a saved adapter."""
    return f"{PREFIX}{layer}.lora_B.weight", f"{PREFIX}{layer}.lora_A.weight"


def layer_of(key: str) -> str | None:
    """The layer of a saved A or Bᵀ; None if ``key`` belongs to another kind of tensor."""
    found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_[AB]\.weight", key)
    return found and found[1]


def saved_config(
    base: str, modules: Collection[str], ranks: Mapping[str, int], scalings: Mapping[str, float]
) -> dict[str, Any]:
    """The content of adapter_config.json of a LoRA adapter.

    Args:
        base: name of the base model.
        modules: the names of all modules of the model.
        ranks: {layer: r}.
        scalings: {layer: s}.
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
    """The layers' last name components, or their full names if another module has one of these."""
    suffixes = {layer.rpartition(".")[2] for layer in layers}
    selected = {name for name in modules if name.rpartition(".")[2] in suffixes}
    return sorted(suffixes) if selected == set(layers) else list(layers)


class SavedScaling:
    """The s of each layer of a saved adapter, by PEFT's rules.

    ``rank_pattern`` and ``r`` are not read: the tensors' shapes say r.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """
        Args:
            config: content of adapter_config.json, which may come from anyone.

        Raises:
            ValueError: lora_alpha or alpha_pattern is not what PEFT writes.
        """
        self.alpha = _positive(config.get("lora_alpha", 8), "lora_alpha")
        self.rank_stabilized = bool(config.get("use_rslora"))
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise ValueError("alpha_pattern is no JSON object")
        if sum(map(len, patterns)) > LONGEST_PATTERNS:
            raise ValueError(f"alpha_pattern has more than {LONGEST_PATTERNS} characters")
        self.patterns = [
            (NamePattern(pattern), _positive(alpha, "alpha")) for pattern, alpha in patterns.items()
        ]

    def of(self, layer: str, rank: int) -> float:
        """s of the layer of this name, which has r = ``rank``. The first pattern decides."""
        matching = (alpha for pattern, alpha in self.patterns if pattern.matches(layer))
        return next(matching, self.alpha) / (rank**0.5 if self.rank_stabilized else rank)


def not_plain_lora(config: Mapping[str, Any]) -> str | None:
    """Why a saved adapter is more than s·A Bᵀ on linear layers, for an error message, or None."""
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


def _positive(value: Any, name: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} {reprlib.repr(value)} is no positive number")
    return float(value)


def _number(value: float) -> float | int:
    """``value`` in 12 digits, without rounding errors; an integer as int, as some readers need."""
    rounded = float(f"{value:.12g}")
    return int(rounded) if rounded.is_integer() else rounded
