"""Models and tokenizers by name: loaded, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from scalora_dist.config import ModelArguments
from scalora_dist.errors import UserError


def hidden_size(args: ModelArguments) -> int:
    """The model's width, which engines size their buffers by."""
    with _known_model(args) as name:
        config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    return config.get_text_config().hidden_size


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    with _known_model(args) as name:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)


def load_model(args: ModelArguments, dtype: torch.dtype, *, weights: bool) -> PreTrainedModel:
    """The model in ``dtype``, sharded where the engine's ``loading()`` says so.

    Without ``weights``, its parameters are on "meta" (its buffers are not).
    """
    given = {
        "dtype": dtype,
        "attn_implementation": args.attn_implementation,
        "trust_remote_code": args.trust_remote_code,
    }
    with _known_model(args) as name:
        if weights:
            return AutoModelForCausalLM.from_pretrained(name, **given)
        config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, **given)
        model.tie_weights()
        return model


@contextmanager
def _known_model(args: ModelArguments) -> Iterator[str]:
    """The model's name; what transformers raises where it cannot be read, as one sentence."""
    name = args.model_name_or_path
    if not name:
        raise UserError("--model_name_or_path is missing: name a folder or a model of the hub")
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise UserError(f"--model_name_or_path {name}: there is no such folder")
    try:
        yield name
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--model_name_or_path {name} cannot be loaded: {reason}") from error
