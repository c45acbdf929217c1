"""Models and tokenizers by name: loaded, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoHfQuantizer

from scalora_dist.adapters.fourbit import FourBit, check_products, take_over
from scalora_dist.config import ModelArguments
from scalora_dist.errors import UserError


@dataclass(frozen=True)
class Base:
    """What is known of a base model before it is loaded.

    Attributes:
        hidden_size: its width, which engines size their buffers by.
        fourbit: how its linear layers are kept; None: dense.
        quantized: whether its files hold them so already.
    """

    hidden_size: int
    fourbit: FourBit | None
    quantized: bool


def read_base(args: ModelArguments, dtype: torch.dtype, device: torch.device) -> Base:
    """What the model's config.json and the options say.

    Args:
        dtype: of the training. device: this rank's.

    Raises:
        UserError: a base quantized in a way that cannot be trained here, 4-bit settings that would
            corrupt it, no bitsandbytes.
    """
    with _known_model(args) as name:
        config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    width = config.get_text_config().hidden_size
    saved = _saved_quantization(config)
    if saved is None and not args.load_in_4bit:
        return Base(width, None, False)
    if saved is not None:
        kind = saved.get("quant_method", "an unknown method")
        if kind != "bitsandbytes" or not saved.get("load_in_4bit", saved.get("_load_in_4bit")):
            bits = " in 8 bits" if kind == "bitsandbytes" else ""
            raise UserError(
                f"--model_name_or_path {name} is quantized by {kind}{bits}: name the model it was "
                "made from (and --load_in_4bit), or a base in bitsandbytes' 4 bits"
            )
    compute = getattr(torch, args.bnb_4bit_compute_dtype or "", None)
    if saved is None:
        storage = getattr(torch, args.bnb_4bit_quant_storage)
        fourbit = FourBit(
            args.bnb_4bit_quant_type, args.bnb_4bit_use_double_quant, compute, storage
        )
    else:
        fourbit = FourBit(
            saved.get("bnb_4bit_quant_type", "fp4"),
            bool(saved.get("bnb_4bit_use_double_quant", False)),
            compute,
            getattr(torch, saved.get("bnb_4bit_quant_storage", "uint8")),
        )
    if fourbit.storage not in (torch.uint8, dtype):
        raise UserError(
            f"--bnb_4bit_quant_storage {_name(fourbit.storage)} is cast to the training's "
            f"{_name(dtype)} by engines, which destroys the codes: set uint8 or {_name(dtype)}"
        )
    check_products(fourbit, device)
    return Base(width, fourbit, saved is not None)


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    with _known_model(args) as name:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)


def load_model(
    args: ModelArguments, base: Base, dtype: torch.dtype, *, weights: bool
) -> PreTrainedModel:
    """The model in ``dtype``, sharded where the engine's ``loading()`` says so.

    Its linear layers but the LM head are FourBitLinear where ``base`` says so: each is quantized as
    its tensor is read, so that never more than one of them is dense.

    Without ``weights``, its parameters are on "meta" (its buffers are not, but for those of
    FourBitLinear).
    """
    given: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": args.attn_implementation,
        "trust_remote_code": args.trust_remote_code,
    }
    quantization = None
    if base.fourbit and not base.quantized:
        given["quantization_config"] = quantization = _as_bnb_config(base.fourbit)
    with _known_model(args) as name:
        if weights:
            model = AutoModelForCausalLM.from_pretrained(name, **given)
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
            given.pop("quantization_config", None)
            saved = _saved_quantization(config)
            if saved is not None:
                quantization = BitsAndBytesConfig.from_dict(saved)
                _forget_quantization(config)
            with init_empty_weights():
                model = AutoModelForCausalLM.from_config(config, **given)
            if quantization:
                quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=base.quantized)
                quantizer.preprocess_model(model=model, device_map=None)
            model.tie_weights()
    if base.fourbit:
        take_over(model, base.fourbit)
        _as_dense(model)
    return model


def _as_bnb_config(fourbit: FourBit) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=fourbit.quant_type,
        bnb_4bit_compute_dtype=fourbit.compute_dtype,
        bnb_4bit_quant_storage=fourbit.storage,
        bnb_4bit_use_double_quant=False,  # done in `take_over`, alike on any number of threads
    )


def _saved_quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What config.json says of quantized weights."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(), "quantization_config", None)
    return found.to_dict() if found is not None and not isinstance(found, dict) else found


def _forget_quantization(config: PreTrainedConfig) -> None:
    for holder in (config, config.get_text_config()):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config


def _as_dense(model: PreTrainedModel) -> None:
    """Take off what transformers hung on a quantized model: it may be moved, cast and saved."""
    _forget_quantization(model.config)
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit"):
        if name in vars(model):
            delattr(model, name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
