"""Options of the base model and of the format of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Optional

from scalora_dist.config.option import Group, option


@dataclass(frozen=True)
class ModelArguments(Group):
    _argument_group_name = "model"

    model_name_or_path: Optional[str] = option(
        None, "A folder in Hugging Face format or a hub name.", resume="free"
    )
    model_revision: Optional[str] = option(
        None,
        "Branch, tag or commit of a model of the hub; by default its main branch.",
        resume="fixed",
    )
    attn_implementation: Optional[str] = option(
        None,
        "eager, sdpa or flash_attention_2; by default flash_attention_2 in 16 bits on a GPU where "
        "it is installed (extra: flash) and the model has it, else sdpa.",
        resume="free",
    )
    trust_remote_code: bool = option(
        False, "Run the model's own Python code from the hub.", resume="free"
    )
    load_in_4bit: bool = option(
        False,
        "Quantize all linear layers but the LM head to bitsandbytes' 4 bits (extra: quant).",
        resume="fixed",
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option(
        "nf4", "Format of the 4-bit codes.", resume="fixed"
    )
    bnb_4bit_use_double_quant: bool = option(
        True,
        "Quantize the block sizes too: they take 0.016 bytes per weight, not 0.063.",
        resume="fixed",
    )
    bnb_4bit_compute_dtype: Optional[Literal["float32", "bfloat16", "float16"]] = option(
        None,
        "Dtype that 4-bit weights are dequantized to for products; by default the input's.",
        resume="fixed",
    )
    bnb_4bit_quant_storage: Literal["uint8", "float32", "bfloat16", "float16"] = option(
        "uint8",
        "Dtype of the tensors that hold the codes: uint8, or the training's dtype.",
        resume="free",
    )
    adapter_name_or_path: Optional[str] = option(
        None, "Continue from this PEFT LoRA adapter (a folder, or a hub name).", resume="free"
    )

    @property
    def source(self) -> dict[str, Any]:
        """Keywords of every ``from_pretrained`` that reads the base model, beside its name."""
        revision = self.model_revision or "main"
        return {"revision": revision, "trust_remote_code": self.trust_remote_code}
