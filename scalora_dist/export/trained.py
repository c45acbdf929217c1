"""What a checkpoint says was trained: its options, its model, and the exports of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from scalora_dist.checkpoint.contents import describe_state, read_whole_state
from scalora_dist.checkpoint.manifest import STATE
from scalora_dist.checkpoint.tensors import CheckpointTensors
from scalora_dist.config.options import Options
from scalora_dist.errors import UserError
from scalora_dist.export.checkpoint_parameters import CheckpointParameters
from scalora_dist.methods.method import AddContext
from scalora_dist.methods.registry import METHODS, writes_adapter
from scalora_dist.model_io.base_weights import BaseWeights
from scalora_dist.model_io.export_adapter import AdapterExport
from scalora_dist.model_io.export_model import ModelExport
from scalora_dist.model_io.model_card import Kind, model_card, without_paths
from scalora_dist.modeling.load import load_model, load_tokenizer, quiet, read_base_model


class Trained:
    """The trained model of a sound checkpoint. Its tensors are read while they are exported.

    Attributes:
        folder: the checkpoint.
        state: the contents of its state.json.
        options: the run's options.
        method: the run's method.
        trained_parameters: number of trained parameters.
        base: the base model.
        parameters: of the trained model and its method.
    """

    def __init__(self, folder: Path, model: str | None, trust_remote_code: bool) -> None:
        """Build the model without storage.

        Args:
            folder: the checkpoint.
            model: name of the base model; None: the run's own.
            trust_remote_code: whether to run the base model's own code.

        Raises:
            UserError: the checkpoint is of another version, or the base model cannot be read.
        """
        self.folder = folder
        state = read_whole_state(folder)
        damage = state if isinstance(state, str) else describe_state(state)
        if isinstance(state, str) or isinstance(damage, str):
            raise UserError(f"{folder}: {damage}")
        self.state = state
        try:
            self.names_on_hub = [*map(str, state.get("names_on_hub", ()))]
            used = {name: int(count) for name, count in state["merges"].get("used", {}).items()}
            self.options = options = self._options(model, trust_remote_code)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder}: {STATE} does not hold what a run saves") from error
        self.method = METHODS[options.method.name]
        dtype = options.train.dtype
        with quiet():
            spec = read_base_model(options.model, dtype, torch.device("cpu"))
            whole = load_model(options.model, spec, dtype, weights=False)
            context = AddContext(options.method, options.train.seed, dtype)
            adapted = self.method.add(whole, context)
        self.trained_parameters = sum(p.numel() for p in whole.parameters() if p.requires_grad)
        self.base = BaseWeights(options.model, dtype)
        self.parameters = CheckpointParameters(
            whole,
            adapted,
            CheckpointTensors(folder),
            self.base,
            used=used,
            carry_rank=options.method.carry_rank or 0,
        )

    def write_model(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Write the merged model.

        Args:
            folder: the folder to write.
            dtype: dtype of the weights; None: the training's.

        Raises:
            UserError: the base model is not the run's, or cannot be read.
        """
        export = ModelExport(self.base, dtype or self.options.train.dtype)
        gathered = export.gathered(self.parameters, ())
        tokenizer = load_tokenizer(self.options.model)
        self.parameters.check_base(self.state["base"])
        export.write(folder, self.parameters, gathered, {}, tokenizer, self._card("model"))

    def write_adapter(self, folder: Path, rank: int | None, dtype: torch.dtype | None) -> None:
        """Write the adapter.

        Args:
            folder: the folder to write.
            rank: rank of an approximation of what was merged into W; None: the run's own option.
            dtype: dtype of the factors; None: float32.

        Raises:
            UserError: the run has no adapter; for an approximation, the base model is not the run's
                or cannot be read. Other adapters need none of its weights.
        """
        method = self.options.method
        merges = self.method.merges and method.merge_target == "weight"
        if rank is not None:
            if not merges:
                raise UserError(
                    f"--adapter_rank is for runs that merge into W, and --method {method.name} of "
                    "this run does not: set --adapter instead, or export the model"
                )
            self.options = self.options.having(adapter_rank=rank)
        if not writes_adapter(self.options):
            raise UserError(
                f"--method {method.name} leaves no adapter: "
                + ("set --adapter_rank, or export the model" if merges else "export the model")
            )
        export = AdapterExport(self.options, self.base)
        if export.before:
            self.parameters.check_base(self.state["base"])
        card = self._card("adapter")
        export.write(folder, self.parameters, card, dtype or torch.float32)

    def _options(self, model: str | None, trust_remote_code: bool) -> Options:
        options = Options.saved(self.state["options"])
        name = str(model or options.model.model_name_or_path)
        if not (model or self._is_on_hub(name) or Path(name).is_dir()):
            raise UserError(
                f"the run's base model {name} is not here: name its folder with "
                "--model_name_or_path"
            )
        given: dict[str, Any] = {}
        if model:
            given = {"model_name_or_path": model, "model_revision": None}
        return replace(
            options,
            # Attention does not matter here, and this machine may lack the run's.
            model=replace(
                options.model,
                attn_implementation="eager",
                trust_remote_code=trust_remote_code,
                **given,
            ),
        )

    def _card(self, kind: Kind) -> str:
        tally = self.state["progress"]["tally"]
        summary = {
            "steps": tally["steps"],
            "skipped_steps": tally["skipped"],
            "loss_first": tally["loss_first"],
            "loss_last": tally["loss_last"],
            "trained_parameters": self.trained_parameters,
            "world_size": self.state["world_size"],
        }
        options = without_paths(self.options, self.names_on_hub)
        return model_card(kind, options, summary, self.state["versions"])

    def _is_on_hub(self, name: str) -> bool:
        """Whether the run's base model was read from the hub; older checkpoints do not know."""
        return "names_on_hub" not in self.state or name in self.names_on_hub
