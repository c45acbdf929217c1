"""Writes the small files of a model: configs, code, tokenizer, processors."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

from scalora_dist.modeling.base_files import BaseFiles, base_file

PROCESSORS = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)
logger = logging.getLogger(__name__)


class ModelFiles:
    """All files of a model but its weights, as ``save_pretrained`` of model and tokenizer writes.

    What is the base model's is read at once, because its folder may be gone at the end of a run.

    Attributes:
        model: the model in the dtype of the saved weights, without storage.
        generation_config: the base model's; None: the model does not generate.
        copied: {name of a file that is copied: its content}.
    """

    def __init__(self, files: BaseFiles, model: PreTrainedModel) -> None:
        """Warns if a multimodal model has no processor files: servers need them.

        Args:
            files: the base model's files.
            model: as the attribute.
        """
        self.model = model
        self.generation_config = _generation_config(files) if model.can_generate() else None
        wanted = [GENERATION_CONFIG_NAME]
        if model.config.get_text_config() is not model.config:
            wanted += [*PROCESSORS, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE]
        found = {
            name: path.read_bytes() for name in wanted if (path := base_file(files.args, name))
        }
        if len(wanted) > 1 and not any(name in found for name in PROCESSORS):
            logger.warning(
                "%s has no processor files (%s), which servers need for a multimodal model: copy "
                "them to the exported model",
                files.args.model_name_or_path,
                ", ".join(PROCESSORS),
            )
        self._generation_file = found.pop(GENERATION_CONFIG_NAME, None)
        self.copied = found

    def write(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write config.json, a model's own code, the generation config, tokenizer and processors.

        Args:
            folder: folder of the model, which is empty.
            tokenizer: the run's tokenizer.
        """
        self.model.generation_config = GenerationConfig()
        shows_progress = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        self.model.save_pretrained(folder, state_dict={})  # writes no weights
        if shows_progress:
            transformers_logging.enable_progress_bar()
        if self.generation_config:
            try:
                self.generation_config.save_pretrained(folder)
            except ValueError:  # older versions write none that contradicts itself
                if self._generation_file:
                    (folder / GENERATION_CONFIG_NAME).write_bytes(self._generation_file)
        tokenizer.save_pretrained(folder)
        for name, content in self.copied.items():
            (folder / name).write_bytes(content)


def _generation_config(files: BaseFiles) -> GenerationConfig:
    """The base model's generation config, read as ``from_pretrained`` reads it."""
    name, revision = str(files.args.model_name_or_path), files.args.model_revision or "main"
    try:
        return GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:  # older models have such settings in config.json
        return GenerationConfig.from_pretrained(
            name, "config.json", _from_model_config=True, revision=revision
        )
