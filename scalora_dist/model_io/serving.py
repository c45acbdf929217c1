"""What servers accept of a LoRA adapter, as far as its rank and the names of its layers show.

Read in vLLM's source:

* ``vllm/config/lora.py`` (commit 01230b40128e): the values of ``--max-lora-rank``.
* ``vllm/lora/peft_helper.py`` (commit e745bafffc44): of the config only ``r`` and ``lora_alpha``
  count, and r must not exceed ``--max-lora-rank``. Later versions read ``rank_pattern`` and
  ``alpha_pattern`` too.
* ``vllm/lora/lora_model.py`` (commit 0306474e9d1f): an adapter is refused if a layer's last name
  component is none of the model's modules that take LoRA. ``vllm/lora/utils.py`` (commit
  001e63a89b47, and a later one with experts): these are its linear layers (vLLM's own classes),
  and the embeddings and heads that the model's class names.
* ``vllm/lora/model_manager.py`` (commit 01533aa8f9c0): a layer that no LoRA class of vLLM fits is
  left as it is, with a warning in the server's log.

Which classes a model has in vLLM cannot be told from names. So these are objections, not refusals.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's --max-lora-rank, which may also be 1

Suspicious = Callable[[list[str]], bool]

# (whether a layer's name components look so, what vLLM does with such layers)
SUSPICIOUS: tuple[tuple[Suspicious, str], ...] = (
    (
        lambda parts: not any(part.isdecimal() for part in parts),
        "is in no decoder block, and vLLM adapts such layers in some models only",
    ),
    (
        lambda parts: parts[-1] in ("gate", "router", "shared_expert_gate"),
        "routes tokens to experts, and vLLM ignores or refuses routers in some models",
    ),
    (
        lambda parts: "experts" in parts,
        "is one of several experts, which older versions of vLLM refuse",
    ),
    (
        lambda parts: parts[-1].startswith("in_proj") or parts[-1] in ("x_proj", "dt_proj"),
        "belongs to a state-space or linear-attention layer, which vLLM adapts in some models only",
    ),
)


def served_rank(at_least: int) -> int | None:
    """The smallest rank that a server can be set to from ``at_least`` on; None: it is too large."""
    return next((rank for rank in SERVED_RANKS if rank >= at_least), None)


def vllm_objections(layers: Collection[str], rank: int) -> str | None:
    """Why vLLM may refuse an adapter or ignore a part of it, for a warning; None: nothing seen.

    Args:
        layers: the names of the adapted layers.
        rank: r of the adapter.
    """
    found = []
    if served_rank(rank) is None:
        found.append(f"rank {rank} is above {SERVED_RANKS[-1]}, the largest --max-lora-rank")
    for suspicious, why in SUSPICIOUS:
        name = next((layer for layer in layers if suspicious(layer.split("."))), None)
        if name is not None:
            found.append(f"{name} {why}")
    return "; ".join(found) or None
