"""Which models need an attention mask for padding on the right, and how the others are run.

In a causal model no token sees the tokens after it. Padding on the right comes after all tokens of
an example, so a mask of it changes nothing at them, and padding is no target. But a mask costs
time: scaled dot-product attention uses its flash kernel only for plain causal attention.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel, masking_utils, modeling_flash_attention_utils

# Types of layers in transformers' configs that are causal attention, over all or the last tokens.
CAUSAL_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def needs_mask(model: PreTrainedModel) -> bool:
    """Whether ``model`` needs an attention mask for padding on the right. Yes, where in doubt.

    It needs none if all of this holds for its decoder:

    * Its code is transformers' own.
    * Its attention modules say that they are causal (``is_causal``). Encoders, decoders of an
      encoder's states, and decoders whose tokens see later ones (Gemma-3 with
      ``use_bidirectional_attention``) say no, or nothing.
    * All its layers are attention. Recurrent ones (Mamba, linear attention) and convolutions set
      padding to zero by the mask. This is checked in three places: ``_is_stateful`` of the model,
      ``layer_types`` of the config, and whether the module of the decoder's code has
      transformers' function for it, ``apply_mask_to_padding_states``.

    A router does not matter: transformers' route each token by itself, and use the mask only for a
    loss that balances experts, which is not trained here.
    """
    decoder = model.get_decoder()
    if not type(decoder).__module__.startswith("transformers.models."):
        return True
    says = [module.is_causal for module in decoder.modules() if hasattr(module, "is_causal")]
    kinds = set(getattr(decoder.config, "layer_types", None) or ())
    recurrent = getattr(model, "_is_stateful", False) or not kinds <= CAUSAL_ATTENTION
    zeroes = hasattr(sys.modules[type(decoder).__module__], "apply_mask_to_padding_states")
    return recurrent or zeroes or not says or not all(says)


@contextmanager
def whole_rows() -> Iterator[None]:
    """Inside it, transformers takes each row without attention mask as one sequence.

    Without a mask, transformers reads the position ids back from the device, to see whether a row
    holds several sequences. Ours never does. The host would wait for the device once in a forward.
    With FlashAttention 2 and one example it would wait in each layer, and again in the backward
    where a checkpoint repeats the layer. So backwards run inside it too. On tensors without values
    transformers would assume several sequences.
    """
    find = masking_utils.find_packed_sequence_indices
    asks = modeling_flash_attention_utils._is_packed_sequence
    masking_utils.find_packed_sequence_indices = _none_found
    modeling_flash_attention_utils._is_packed_sequence = _not_packed
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find
        modeling_flash_attention_utils._is_packed_sequence = asks


# Functions of this module, because torch.compile compiles again for a new one.
def _none_found(position_ids: Any) -> None:
    return None


def _not_packed(position_ids: Any, batch_size: int) -> bool:
    return False
