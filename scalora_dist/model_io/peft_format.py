"""PEFT's file format of a LoRA adapter: tensors and adapter_config.json. Needs no PEFT.

The scale s of a layer is written into A, and ``lora_alpha`` is r. So readers of ``r`` and
``lora_alpha`` alone compute the update of every layer, whatever its s. ``TrainedScaling`` keeps
the s of the training beside the tensors.
"""

from __future__ import annotations

import json
import re
import reprlib
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from scalora_dist.config.method import MethodArguments
from scalora_dist.config.words import Parser, option_words
from scalora_dist.errors import UserError
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


def saved_factors(a: Tensor, b: Tensor, scaling: float, rank: int) -> tuple[Tensor, Tensor]:
    """The tensors of s·A Bᵀ as they are saved, in the order of ``saved_names``.

    Args:
        a: A (m, columns).
        b: B (n, columns).
        scaling: s.
        rank: r of the saved adapter; the columns from ``columns`` on are zero.

    Returns:
        s·A (m, r) and Bᵀ (r, n), float32.
    """
    added = (0, rank - a.shape[1])
    left = (a.double() * scaling).float()
    return F.pad(left, added), F.pad(b.float(), added).T


def unscaled(left: Tensor, saved: float, scaling: float) -> Tensor:
    """The A of ``scaling``·A Bᵀ = ``saved``·left Bᵀ, float32. It is exact if the two are equal.

    Undoes the product in ``saved_factors``: exactly for an s that is a power of two, else to one
    rounding.

    Args:
        left: saved A (m, r).
        saved: the saved adapter's s.
        scaling: s of the layer that gets A.
    """
    return (left.double() * saved / scaling).float()


def saved_config(
    base: str, modules: Collection[str], layers: Collection[str], rank: int
) -> dict[str, Any]:
    """The content of adapter_config.json of a LoRA adapter whose A are scaled.

    Args:
        base: name of the base model.
        modules: the names of all modules of the model.
        layers: the names of the adapted layers.
        rank: r of all layers.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": shortest_names(layers, modules),
        "r": rank,
        "rank_pattern": {},
        "lora_alpha": rank,
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


# Options that decide the rank and the scale with which A and B are trained.
OF_SCALING = (
    *("method", "rank", "lora_alpha", "alpha_variant", "alpha_multiplier"),
    *("merge_target", "carry_rank"),
)


@dataclass(frozen=True)
class TrainedScaling:
    """The options and the scales with which A and B were trained, kept in the tensors' file.

    They are in the metadata of adapter_model.safetensors, because PEFT warns of unknown keys in
    adapter_config.json.

    Attributes:
        args: the method's options; only those of ``OF_SCALING`` count.
        scalings: {layer: s}.
    """

    args: MethodArguments
    scalings: dict[str, float]

    KEY = "scalora_dist"

    def metadata(self) -> dict[str, str]:
        """The entries of the file's metadata: one s if all layers share it."""
        different = set(self.scalings.values())
        scaling = self.scalings if len(different) > 1 else different.pop()
        options = {name: getattr(self.args, name) for name in OF_SCALING if self.args.reads(name)}
        return {self.KEY: json.dumps({"options": options, "scaling": scaling})}

    @classmethod
    def read(
        cls, metadata: Mapping[str, str] | None, ranks: Mapping[str, int]
    ) -> TrainedScaling | None:
        """What a file's metadata say; None: nothing, as in a file of PEFT's.

        Args:
            metadata: metadata of the file, which may come from anyone.
            ranks: {layer: r of the saved adapter}.

        Raises:
            ValueError: the entry is not what ``metadata`` writes, or is of another adapter.
        """
        text = (metadata or {}).get(cls.KEY)
        if text is None:
            return None
        try:
            found = json.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(found, dict) or not isinstance(found.get("options"), dict):
            raise ValueError("it has no options")
        args = _saved_options(found["options"])
        if args.rank > min(ranks.values()):
            raise ValueError(f"rank {args.rank} is none of this adapter's")
        scaling = found.get("scaling")
        if not isinstance(scaling, dict):
            scaling = dict.fromkeys(ranks, scaling)
        for layer in ranks:
            if layer not in scaling:
                raise ValueError(f"it has no scaling of {layer}")
        return cls(args, {x: _positive(scaling[x], f"scaling of {x}") for x in ranks})

    def differing(self, args: MethodArguments) -> str:
        """The options of ``args`` that differ from these, with these options' values."""
        names = [name for name in OF_SCALING if self.args.reads(name)]
        wanted = {name: getattr(self.args, name) for name in names}
        return " ".join(
            f"--{name} {value:.12g}" if isinstance(value, float) else f"--{name} {value}"
            for name, value in wanted.items()
            if value is not None and (value != getattr(args, name) or not args.reads(name))
        )


def _saved_options(options: Mapping[str, Any]) -> MethodArguments:
    """Options of a file that may come from anyone.

    Raises:
        ValueError: one is unknown, or has a value that it cannot have.
    """
    for name, value in options.items():
        simple = value is None or (isinstance(value, str | int | float) and value is not True)
        if name not in OF_SCALING or not simple:
            raise ValueError(f"{reprlib.repr(name)} is {reprlib.repr(value)}")
    words = [word for name, value in options.items() for word in option_words(name, value)]
    try:
        parser = Parser([MethodArguments], allow_abbrev=False, add_help=False)
        (args,) = parser.parse_args_into_dataclasses(words)
    except UserError as error:
        raise ValueError(str(error)) from error
    return args


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
