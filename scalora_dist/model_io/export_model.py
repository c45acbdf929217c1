"""Writes the merged model in Hugging Face format, tensor by tensor from shards.

No rank ever holds the full model. Each tensor is gathered alone, and rank 0 appends it to a
safetensors file. (The safetensors library can only write tensors that are all in memory.)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, cached_file

from scalora_dist.engines.base import Engine
from scalora_dist.model_io.merged_weights import MergedWeights
from scalora_dist.model_io.safetensors_writer import SafetensorsWriter


@torch.no_grad()
def export_model(
    folder: Path,
    engine: Engine,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    low_halves: Mapping[str, Tensor],
) -> None:
    """Write all weights, those of adapted layers merged, in the engine's dtype.

    Collective: called on every rank, only rank 0 writes. Persistent buffers keep their own dtype.

    Args:
        folder: folder of the model; replaced if it exists.
        engine: the engine with the sharded model.
        model: the model, for its config and buffers.
        tokenizer: saved beside the model.
        low_halves: {parameter: low halves of its 16-bit values}, int16.
    """
    merged = MergedWeights(engine, low_halves)
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    entries = {name: (merged.shape(name), engine.dtype) for name in merged.base}
    entries |= {name: (buffer.shape, buffer.dtype) for name, buffer in buffers.items()}
    # The plan only needs sizes, so meta tensors are enough.
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(shape, dtype=d, device="meta") for name, (shape, d) in entries.items()}
    )
    is_main = engine.world.is_main
    progress = tqdm(
        total=len(entries), desc="writing the model", disable=None if is_main else True, leave=False
    )
    with written_aside(folder, is_main=is_main) as aside:
        for filename, names in plan.filename_to_tensors.items():
            with open(aside / filename if is_main else os.devnull, "wb") as file:
                writer = SafetensorsWriter(file, {name: entries[name] for name in names})
                for name in names:
                    tensor = (
                        buffers[name] if name in buffers else merged.full_tensor(name, on_rank=0)
                    )
                    if is_main and tensor is not None:
                        writer.write(tensor.to(entries[name][1]))
                    progress.update()
        progress.close()
        if not is_main:
            return
        if plan.is_sharded:
            files = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (aside / "model.safetensors.index.json").write_text(json.dumps(files, indent=2))
        model.config.save_pretrained(aside)
        if model.can_generate():
            model.generation_config.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if model.config.get_text_config() is not model.config:
            # Servers need the processor files of a multimodal model.
            for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME):
                file = cached_file(
                    model.name_or_path, name, _raise_exceptions_for_missing_entries=False
                )
                if file:
                    shutil.copy(file, aside)


@contextmanager
def written_aside(folder: Path, *, is_main: bool) -> Iterator[Path]:
    """A temporary folder that is renamed to ``folder`` at the end, so ``folder`` is never partial.

    Only rank 0 makes, renames and removes folders. After a full disk it frees what it took.
    """
    aside = folder.with_name(f"{folder.name}.partial")
    if is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    try:
        yield aside
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if is_main:
        shutil.rmtree(folder, ignore_errors=True)
        aside.replace(folder)
