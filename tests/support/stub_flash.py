"""FlashAttention 2 without its package: transformers' code around a kernel that is torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils


def use(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    """Let ``model`` compute as with FlashAttention 2, until ``patch`` is undone."""
    functions = (_kernel, _none, None, _none, _none), (_arguments, _arguments)
    patch.setattr(
        modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_: functions
    )
    patch.setattr(model.config.get_text_config(), "_attn_implementation", "flash_attention_2")


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (examples, length, heads, features)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _arguments(**_: Any) -> dict[str, Any]:
    return {}


def _none(*_: Any, **__: Any) -> Any:
    raise AssertionError("rows of one sequence need no other kernel")
