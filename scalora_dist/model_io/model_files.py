"""Writes the small files of a model: configs, code, tokenizer, processors."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)
from transformers.utils import logging as transformers_logging

from scalora_dist.modeling.base_files import BaseFiles

PROCESSORS = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)
logger = logging.getLogger(__name__)


def write_model_files(
    folder: Path, files: BaseFiles, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write all but the weights, as ``save_pretrained`` of model and tokenizer does.

    These are config.json, the generation config, the tokenizer's files, and the code of a model
    that came with its own. The processor files of a multimodal model are copied.

    Args:
        folder: folder of the model, which is empty.
        files: the base model's files.
        model: the model in the dtype of the saved weights, which may have no storage.
        tokenizer: the run's tokenizer.
    """
    generation_config = _generation_config(files) if model.can_generate() else None
    model.generation_config = GenerationConfig()
    shows_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder, state_dict={})  # writes no weights
    if shows_progress:
        transformers_logging.enable_progress_bar()
    if generation_config:
        try:
            generation_config.save_pretrained(folder)
        except ValueError:  # older versions write none that contradicts itself
            if file := files.cached(GENERATION_CONFIG_NAME):
                shutil.copy(file, folder / file.name)
    tokenizer.save_pretrained(folder)
    if model.config.get_text_config() is not model.config:
        _copy_processors(folder, files)


def _generation_config(files: BaseFiles) -> GenerationConfig:
    """The base model's generation config, read as ``from_pretrained`` reads it."""
    name, revision = str(files.args.model_name_or_path), files.args.model_revision or "main"
    try:
        return GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:  # older models have such settings in config.json
        return GenerationConfig.from_pretrained(
            name, "config.json", _from_model_config=True, revision=revision
        )


def _copy_processors(folder: Path, files: BaseFiles) -> None:
    found = [path for name in PROCESSORS if (path := files.cached(name))]
    for path in found:
        shutil.copy(path, folder / path.name)
    if not found:
        logger.warning(
            "%s has no processor files (%s), which servers need for a multimodal model: copy them "
            "to %s",
            files.args.model_name_or_path,
            ", ".join(PROCESSORS),
            folder.name,
        )
