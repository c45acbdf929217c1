"""Writes the merged model as ``save_pretrained`` would, a few tensors at a time, from shards.

No rank ever holds the full model. The tensors that are converted together are gathered, and rank 0
appends what is made of them to a safetensors file. (The safetensors library can only write tensors
that are all in memory.)
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from scalora_dist.errors import UserError
from scalora_dist.model_io.base_weights import BaseWeights, saved_state, untie
from scalora_dist.model_io.merged_weights import MergedWeights
from scalora_dist.model_io.model_card import NAME as CARD
from scalora_dist.model_io.model_files import ModelFiles
from scalora_dist.model_io.parameters import Parameters
from scalora_dist.model_io.safetensors_writer import SafetensorsWriter
from scalora_dist.model_io.whole_folder import written_aside
from scalora_dist.modeling.conversions import Group
from scalora_dist.modeling.load import outline

LARGEST_FILE = "50GB"  # save_pretrained's own


class ModelExport:
    """Writes a trained model with the names, dtypes and files of ``save_pretrained``. On rank 0.

    Attributes:
        base: the base model.
        model: the model in the dtype of the files, without storage.
        files: all other files of the model.
        state: {name in memory: a meta tensor of its shape and of the dtype in the files}.
        groups: how the tensors in the files are made, in their order.
    """

    def __init__(self, base: BaseWeights, dtype: torch.dtype) -> None:
        """
        Args:
            base: the base model.
            dtype: dtype of the floating-point weights in the files, but of those that the model
                keeps in float32.
        """
        self.base = base
        if dtype == base.dtype:
            self.model, self.state = base.model, base.state
        else:
            self.model = outline(base.args, dtype)
            untie(self.model, base.untied)
            self.state = saved_state(self.model, dtype)
        self.groups = base.conversions.saves(self.state)
        self.files = ModelFiles(base.files, self.model)

    def gathered(self, parameters: Parameters, buffers: Container[str]) -> list[str]:
        """The parameters that ``write`` gathers, in its order. Local.

        Not among them are buffers, and frozen weights that the engine stores in fewer bits than
        they are saved in: they are read from the base model's files.

        Args:
            parameters: of the model and its method.
            buffers: names of the persistent buffers that ``write`` will get.

        Raises:
            UserError: the loaded model has other parameters than its config says, or a tensor is
                neither loaded nor in the files.
        """
        if others := set(parameters.loaded) - self.base.names:
            raise self.base.refuse(f"it was loaded with other parameters, such as {min(others)}")
        names = [name for group in self.groups for name in group.sources]
        found = {name: self.base.one_of(name, parameters.loaded) for name in names}
        for name, loaded in found.items():
            if not (loaded or name in buffers or self.base.has(name)):
                raise UserError(
                    f"no file of the base model and no checkpoint holds {name}: use the model/ "
                    "that the run itself has written"
                )
        trained = {f"{layer}.{key}" for layer in parameters.adapted for key in ("weight", "bias")}
        return [
            loaded
            for name, loaded in found.items()
            if loaded and (loaded in trained or self._exact(name, parameters.dtype(loaded)))
        ]

    @torch.no_grad()
    def write(
        self,
        folder: Path,
        parameters: Parameters,
        gathered: Sequence[str],
        buffers: Mapping[str, Tensor],
        tokenizer: PreTrainedTokenizerBase,
        card: str,
    ) -> None:
        """Write all weights, those of adapted layers merged, and a model's other files.

        Meanwhile the other ranks call ``send_model``.

        Args:
            folder: folder of the model; replaced if it exists.
            parameters: of the trained model and its method.
            gathered: what ``gathered`` returned, and the other ranks send.
            buffers: {name: persistent buffer}; others are read from the base model's files.
            tokenizer: saved beside the model.
            card: text of README.md.
        """
        sent = frozenset(gathered)
        merged = MergedWeights(parameters)

        def source(name: str) -> Tensor:
            loaded, buffer = self.base.one_of(name, sent), buffers.get(name)
            if loaded:
                tensor = merged.full_tensor(loaded, on_rank=0)
                assert tensor is not None
            elif buffer is not None and self._exact(name, buffer.dtype):
                tensor = buffer
            else:
                tensor = self.base.read(name)
            return tensor.to("cpu", self.state[name].dtype)

        with written_aside(folder, is_main=True) as aside:
            self.files.write(aside, tokenizer)
            (aside / CARD).write_text(card)
            with _Files(aside, self.groups) as files:
                for group in self.groups:
                    tensors = {name: source(name) for name in group.sources}
                    files.write(group, group.make(tensors, self.model))
                    del tensors
            files.write_index(self.model.num_parameters())

    def _exact(self, name: str, dtype: torch.dtype) -> bool:
        """Whether an engine's ``dtype`` is as exact as the files', or they have no such tensor."""
        return dtype.itemsize >= self.base.state[name].dtype.itemsize or not self.base.has(name)


def send_model(names: Sequence[str], parameters: Parameters) -> None:
    """Send parameters to rank 0, which calls ``ModelExport.write``. Collective.

    Args:
        names: what ``ModelExport.gathered`` returned on rank 0.
        parameters: of the trained model and its method.
    """
    merged = MergedWeights(parameters)
    for name in names:
        merged.full_tensor(name, on_rank=0)


class _Files:
    """The safetensors files of a model and their index, each written tensor by tensor."""

    def __init__(self, folder: Path, groups: Sequence[Group]) -> None:
        self.folder = folder
        self.results = {name: x for group in groups for name, x in group.results.items()}
        self.plan = split_state_dict_into_shards_factory(
            self.results,
            get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
            # What is split from one tensor, as experts are, comes into one file.
            get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=LARGEST_FILE,
        )
        self.writers: dict[str, SafetensorsWriter] = {}
        self.open = ExitStack()

    def __enter__(self) -> _Files:
        total = len(self.results)
        bar = tqdm(total=total, desc="writing the model", disable=None, leave=False)
        self.progress = self.open.enter_context(bar)
        return self

    def __exit__(self, *error: object) -> None:
        self.open.close()

    def write(self, group: Group, tensors: Sequence[Tensor]) -> None:
        """Write the results of a group. The groups come in the order of the plan."""
        for name, tensor in zip(group.results, tensors, strict=True):
            self._writer(self.plan.tensor_to_filename[name]).write(tensor)
            self.progress.update()

    def _writer(self, filename: str) -> SafetensorsWriter:
        if filename not in self.writers:
            file = self.open.enter_context((self.folder / filename).open("wb"))
            entries = {
                name: (tensor.shape, tensor.dtype)
                for name, tensor in self.results.items()
                if self.plan.tensor_to_filename[name] == filename
            }
            self.writers[filename] = SafetensorsWriter(file, entries)
        return self.writers[filename]

    def write_index(self, parameters: int) -> None:
        """Write which file holds which tensor, if there are several files.

        Args:
            parameters: number of the model's parameters.
        """
        if not self.plan.is_sharded:
            return
        metadata = {"total_parameters": parameters, **self.plan.metadata}
        index = {"metadata": metadata, "weight_map": self.plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True)
        (self.folder / "model.safetensors.index.json").write_text(f"{text}\n")
