"""Loads base models and tokenizers by name, or refuses them with a one-sentence error."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2
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
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    find_adapter_config_file,
    is_flash_attn_2_available,
)

from scalora_dist.config.model import ModelArguments
from scalora_dist.errors import UserError
from scalora_dist.layers.fourbit_linear import FourBit, FourBitLinear, check_products, take_over
from scalora_dist.modeling.index_files import check_index_files

FLASH = "flash_attention_2"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModelSpec:
    """Facts about a base model that are known before it is loaded.

    Attributes:
        hidden_size: the model's width; engines choose buffer sizes by it.
        fourbit: 4-bit format of the linear layers; None: they are dense.
        quantized: whether the model's files already store them in 4 bits.
        attention: attention implementation to load the model with; None: transformers chooses.
    """

    hidden_size: int
    fourbit: FourBit | None
    quantized: bool
    attention: str | None = None


def read_base_model(
    args: ModelArguments, dtype: torch.dtype, device: torch.device
) -> BaseModelSpec:
    """Read the model's config.json and check it against the options.

    Args:
        args: the model's options.
        dtype: dtype of the training.
        device: this rank's device; "meta" for a plan.

    Raises:
        UserError: the base is quantized in a way that cannot be trained here, 4-bit settings would
            corrupt it, bitsandbytes is missing, or the model's files are not in its folder.
    """
    with known_model(args) as name:
        check_index_files(Path(name))
        if find_adapter_config_file(name, revision=args.model_revision):
            raise UserError(
                f"--model_name_or_path {name} holds an adapter ({ADAPTER_CONFIG_NAME}): name the "
                "base model, and the adapter with --adapter_name_or_path"
            )
        config = AutoConfig.from_pretrained(name, **args.source)
        attention = pick_attention(
            args.attn_implementation,
            # FlashAttention 2 needs an Ampere GPU or a later one.
            installed=is_flash_attn_2_available()
            and (device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)),
            device=device,
            dtype=dtype,
            supported=lambda: has_flash(config, args),
        )
    width = config.get_text_config().hidden_size
    saved = _saved_quantization(config)
    if saved is None and not args.load_in_4bit:
        _check_unread(args, *(f.name for f in fields(args) if f.name.startswith("bnb_4bit_")))
        return BaseModelSpec(width, None, False, attention)
    if saved is not None:
        kind = saved.get("quant_method", "an unknown method")
        if kind != "bitsandbytes" or not saved.get("load_in_4bit", saved.get("_load_in_4bit")):
            bits = " in 8 bits" if kind == "bitsandbytes" else ""
            raise UserError(
                f"--model_name_or_path {name} is quantized by {kind}{bits}: name the model it was "
                "made from (and --load_in_4bit), or a base in bitsandbytes' 4 bits"
            )
    quant_type, double_quant = args.bnb_4bit_quant_type, args.bnb_4bit_use_double_quant
    if saved is not None:
        _check_unread(args, "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
        quant_type = saved.get("bnb_4bit_quant_type", "fp4")
        double_quant = bool(saved.get("bnb_4bit_use_double_quant", False))
    compute = getattr(torch, args.bnb_4bit_compute_dtype or "", None)
    storage = getattr(torch, args.bnb_4bit_quant_storage)
    fourbit = FourBit(quant_type, double_quant, compute, storage)
    if fourbit.storage not in (torch.uint8, dtype):
        raise UserError(
            f"--bnb_4bit_quant_storage {_name(fourbit.storage)} is cast to the training's "
            f"{_name(dtype)} by engines, which destroys the codes: set uint8 or {_name(dtype)}"
        )
    if device.type != "meta":  # "meta" is for plans, which compute no products
        check_products(fourbit, device)
    return BaseModelSpec(width, fourbit, saved is not None, attention)


def pick_attention(
    asked: str | None,
    *,
    installed: bool,
    device: torch.device,
    dtype: torch.dtype,
    supported: Callable[[], bool],
) -> str | None:
    """The attention implementation: what the user asked for, FlashAttention 2, or None (SDPA).

    FlashAttention 2 is the default on GPUs in 16-bit training, if it is installed and the model
    supports it.

    Args:
        asked: value of ``--attn_implementation``; None: not given.
        installed: whether FlashAttention 2 can be imported.
        device: this rank's device.
        dtype: dtype of the training.
        supported: tells whether the model supports it. Called last, as it imports the model's code.
    """
    if asked is not None:
        return asked
    fits = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return FLASH if installed and fits and supported() else None


def has_flash(config: PreTrainedConfig, args: ModelArguments) -> bool:
    """Whether the classes of a model and of its parts support FlashAttention 2. Builds none.

    Args:
        config: the model's config. A multimodal model has one for each part.
        args: the model's options.
    """
    parts = [type(getattr(config, name, None)) for name in config.sub_configs]
    known = [_model_class(config, args), *(MODEL_MAPPING.get(part, None) for part in parts)]
    for model in known:
        for each in model if isinstance(model, tuple) else (model,):
            # Such a model takes other implementations, which `kernels` downloads.
            others = getattr(each, "_compatible_flash_implementations", None)
            if each and (not each._supports_flash_attn or (others and FLASH not in others)):
                logger.info("no %s for this model: %s does not support it", FLASH, each.__name__)
                return False
    return True


def _model_class(config: PreTrainedConfig, args: ModelArguments) -> Any:
    """The class, or a tuple of classes, that ``AutoModelForCausalLM`` builds of ``config``."""
    source = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if source and args.trust_remote_code and not _is_registered(config):
        code = _code(args, config)
        code.pop("trust_remote_code")
        return get_class_from_dynamic_module(source, str(args.model_name_or_path), **code)
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _is_registered(config: PreTrainedConfig) -> bool:
    """Whether transformers already has the class that a model's own code holds."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return isinstance(known, type) and not known.__module__.startswith("transformers.")


def _code(args: ModelArguments, config: PreTrainedConfig) -> dict[str, Any]:
    """Keywords of a ``from_config``, which does not know the revision that ``config`` is from.

    Without them, the model's own code would be that of the main branch. Only such a model takes the
    revision, and only until transformers has registered its class.
    """
    given: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    source = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if args.trust_remote_code and source and not _is_registered(config):
        repository, _, name = source.rpartition("--")
        if name and repository in ("", args.model_name_or_path):
            given["code_revision"] = args.source["revision"]
    return given


def _check_unread(args: ModelArguments, *names: str) -> None:
    default = ModelArguments()
    for name in names:
        if getattr(args, name) != getattr(default, name):
            raise UserError(
                f"--{name} is for a base that --load_in_4bit quantizes, and this one is "
                f"{'quantized already' if args.load_in_4bit else 'not'}: leave it out"
            )


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    with known_model(args) as name:
        return AutoTokenizer.from_pretrained(name, **args.source)


def load_model(
    args: ModelArguments,
    base: BaseModelSpec,
    dtype: torch.dtype,
    *,
    weights: bool,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load the model in ``dtype``; inside an engine's ``loading()`` it may be sharded.

    With ``base.fourbit``, all linear layers except the LM head are FourBitLinear. Each tensor is
    quantized when it is read, so at most one of them is dense at a time.

    Args:
        args: the model's options.
        base: the result of ``read_base_model``.
        dtype: dtype of the dense weights.
        weights: whether to read the weights. If not, parameters are on "meta", and so are the
            buffers of FourBitLinear; other buffers are not.
        device: device to read dense weights to; None: transformers' default.

    Raises:
        UserError: the model cannot be loaded.
    """
    given: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": base.attention,
    }
    quantization = None
    if base.fourbit and not base.quantized:
        given["quantization_config"] = quantization = _as_bnb_config(base.fourbit)
    with known_model(args) as name:
        if weights:
            if device is not None and base.fourbit is None:
                given["device_map"] = {"": device}
            model = AutoModelForCausalLM.from_pretrained(name, **args.source, **given)
        else:
            config = AutoConfig.from_pretrained(name, **args.source)
            given.pop("quantization_config", None)
            saved = _saved_quantization(config)
            if saved is not None:
                quantization = BitsAndBytesConfig.from_dict(saved)
                _forget_quantization(config)
            with init_empty_weights():
                model = AutoModelForCausalLM.from_config(config, **_code(args, config), **given)
            if quantization:
                quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=base.quantized)
                quantizer.preprocess_model(model=model, device_map=None)
            model.tie_weights()
    logger.info("attention: %s", model.config._attn_implementation)
    if base.fourbit:
        take_over(model, base.fourbit)
        _as_dense(model)
        _warn_of_dense(model)
    return model


def outline(args: ModelArguments, dtype: torch.dtype) -> PreTrainedModel:
    """The full model on "meta", dense and with eager attention: its names, shapes, operations."""
    with known_model(args) as name:
        config = AutoConfig.from_pretrained(name, **args.source)
        _forget_quantization(config)
        with init_empty_weights(include_buffers=True):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation="eager",
                **_code(args, config),
            )
        model.tie_weights()
    return model.eval()  # some models need more inputs in training mode


def _as_bnb_config(fourbit: FourBit) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=fourbit.quant_type,
        bnb_4bit_compute_dtype=fourbit.compute_dtype,
        # `take_over` does it, with the same result for any number of threads.
        bnb_4bit_use_double_quant=False,
    )


def _saved_quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The quantization config in config.json, or None."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(), "quantization_config", None)
    return found.to_dict() if found is not None and not isinstance(found, dict) else found


def _forget_quantization(config: PreTrainedConfig) -> None:
    for holder in (config, config.get_text_config()):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config


def _as_dense(model: PreTrainedModel) -> None:
    """Remove transformers' marks of a quantized model, so it may be moved, cast and saved."""
    _forget_quantization(model.config)
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit"):
        if name in vars(model):
            delattr(model, name)


def _warn_of_dense(model: PreTrainedModel) -> None:
    """Warn of large dense weights: 3-D experts and custom linear classes are not quantized."""
    known = {model.get_input_embeddings(), model.get_output_embeddings()}
    dense = {
        name: sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
        for name, module in model.named_modules()
        if not isinstance(module, FourBitLinear) and module not in known
    }
    if left := {name: numel for name, numel in dense.items() if numel}:
        largest = max(left, key=lambda name: left[name])
        logger.warning(
            "%d elements stay dense, since they are not in plain linear layers (the largest: %s)",
            sum(left.values()),
            largest,
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def known_model(args: ModelArguments) -> Iterator[str]:
    """Yield the model's name. Turns transformers' loading errors into a one-sentence UserError."""
    name = args.model_name_or_path
    if not name:
        raise UserError("--model_name_or_path is missing: name a folder or a model of the hub")
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise UserError(f"--model_name_or_path {name}: there is no such folder")
    if args.model_revision and Path(name).is_dir():
        raise UserError(
            f"--model_revision {args.model_revision} is for a model of the hub, and "
            f"--model_name_or_path {name} is a folder: leave it out"
        )
    try:
        yield name
    except (OSError, ValueError, ImportError, SafetensorError, HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        if "trust_remote_code" in str(error) and not args.trust_remote_code:
            reason = (
                "it has Python code of its own: read it, and give --trust_remote_code to run it"
            )
        at = f" (revision {args.model_revision})" if args.model_revision else ""
        if "HF_HUB_OFFLINE" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
            reason += " (the first rank of a node downloads for all: they must share HF_HOME)"
        raise UserError(f"--model_name_or_path {name}{at} cannot be loaded: {reason}") from error
    except AssertionError as error:
        if "Padding_idx" not in str(error):
            raise
        raise UserError(
            f"--model_name_or_path {name} cannot be loaded: its config.json has a pad_token_id "
            "that its embedding has no row for: set it to null there"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the log lines of loading and adapting, where no weights are loaded."""
    ours = logging.getLogger("scalora_dist")
    level = ours.level
    ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.setLevel(level)
