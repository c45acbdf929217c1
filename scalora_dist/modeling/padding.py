"""Which models need an attention mask for padding on the right, and how the others are run.

In a causal model no token sees the tokens after it. Padding on the right comes after all tokens of
an example, so a mask of it changes nothing at them, and padding is no target. But a mask costs
time: scaled dot-product attention uses its flash kernel only for plain causal attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel, masking_utils

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
      padding to zero by the mask.

    A router does not matter: transformers' route each token by itself, and use the mask only for a
    loss that balances experts, which is not trained here.
    """
    decoder = model.get_decoder()
    if not type(decoder).__module__.startswith("transformers.models."):
        return True
    says = [module.is_causal for module in decoder.modules() if hasattr(module, "is_causal")]
    kinds = set(getattr(decoder.config, "layer_types", None) or ())
    recurrent = getattr(model, "_is_stateful", False) or not kinds <= CAUSAL_ATTENTION
    return recurrent or not says or not all(says)


@contextmanager
def whole_rows() -> Iterator[None]:
    """Inside it, a forward without attention mask takes each row as one sequence.

    Without a mask, transformers reads the position ids back from the device, to see whether a row
    holds several sequences. Ours never does. The host would wait for the device in every forward.
    On tensors without values transformers would assume several.
    """
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find
