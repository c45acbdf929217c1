"""Reads a LoRA adapter in PEFT's format, to start training from it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from scalora_dist.config.method import MethodArguments
from scalora_dist.config.options import Options
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.errors import UserError
from scalora_dist.layers.adapted_linear import LowRankLinear
from scalora_dist.methods.merger import Merger
from scalora_dist.methods.runner import MethodRunner
from scalora_dist.model_io.peft_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    SavedScaling,
    TrainedScaling,
    layer_of,
    not_plain_lora,
    saved_names,
    shortest_names,
    unscaled,
)

logger = logging.getLogger(__name__)

DTYPES = ("F64", "F32", "F16", "BF16")  # of tensors that hold plain numbers, as safetensors says


class SavedAdapter:
    """A saved adapter. The constructor reads its config and header, ``fill`` its tensors.

    Its files may come from anyone. What is wrong in them is refused in one sentence.

    If the adapter has r columns, they become A and B. If it has R + r columns, as a run with a
    carry writes them, the first R become the carry. If its s differs from this run's s, A is
    multiplied by the quotient.

    Attributes:
        sizes: {layer: (m, n, columns)}.
        scaling: each layer's s in the file, where our own adapters have s = 1.
        trained: rank and s with which A and B were trained, where the file says so; else None.
    """

    def __init__(self, options: Options, commit: str | None = None) -> None:
        """
        Args:
            options: the options after ``resolve``.
            commit: commit of an adapter of the hub; None: its main branch.

        Raises:
            UserError: there is no LoRA adapter, or its ranks do not agree with the options.
        """
        self.args = args = options.method
        self.name = str(options.model.adapter_name_or_path)
        self._given = {"revision": commit, "_raise_exceptions_for_missing_entries": False}
        if self.name.startswith(("/", ".", "~")) and not Path(self.name).is_dir():
            raise self._refuse("there is no such folder")
        self.scaling = self._read_scaling()
        self.file = self._find(WEIGHTS_FILE, "save it with PEFT, which then writes safetensors")
        self.sizes, self.trained = self._read_header()
        carried = args.carry_rank if args.merge_target == "carry" else None
        for layer, (_, _, rank) in self.sizes.items():
            if rank in (args.rank, args.rank + (carried or 0)):
                continue
            other = rank - args.rank
            hint = f", or --carry_rank {other}" if carried and other >= args.rank else ""
            raise self._refuse(f"{layer} has rank {rank} there: set --rank {rank}{hint}")
        if options.train.rank_monitor_steps and any(
            rank > args.rank for _, _, rank in self.sizes.values()
        ):
            raise self._refuse(
                "it fills the carry, which --rank_monitor_steps cannot see: leave it out"
            )

    def check(self, layers: Mapping[str, nn.Module]) -> None:
        """Check that the adapter fits these layers.

        Args:
            layers: {name: layer that the method adapts}.

        Raises:
            UserError: the adapter has other layers or other shapes, or the method has no A and B.
        """
        names = " ".join(shortest_names(self.sizes, self.sizes))
        for name, layer in layers.items():
            if not isinstance(layer, LowRankLinear):
                raise self._refuse(
                    "this --method has no layers of ours with A and B: set --method lora"
                )
            if name not in self.sizes:
                raise self._refuse(f"it has nothing for {name}: set --target_modules {names}")
            (m, n, _), ours = self.sizes[name], (layer.out_features, layer.in_features)
            if (m, n) != ours:
                raise self._refuse(
                    f"{name} is {m} × {n} there and {ours[0]} × {ours[1]} in this model: set "
                    "--model_name_or_path to the model that it was trained on"
                )
        for name in self.sizes:
            if name not in layers:
                raise self._refuse(f"{name} is not adapted here: set --target_modules {names}")

    @torch.no_grad()
    def fill(self, runner: MethodRunner) -> None:
        """Write this rank's ranges of A, B and the carry, one layer at a time. No communication.

        Raises:
            UserError: on every rank, if a factor is not finite.
        """
        engine, scalings = runner.engine, dict[str, float]()
        with engine.writing(), safe_open(self.file, framework="pt") as file:
            for layer in engine.layer_shards(gradients=False):
                left, right = (file.get_tensor(key) for key in saved_names(layer.name))
                rank = left.shape[1]
                scaling = self.scaling.of(layer.name, rank)
                left, right = unscaled(left, scaling, layer.scaling), right.float().T
                scalings[layer.name] = layer.scaling
                if not (left.isfinite().all() and right.isfinite().all()):
                    raise self._refuse(
                        f"A or B of {layer.name} is not finite, or not after it is scaled by s = "
                        f"{scaling:g}: name another adapter"
                    )
                carried = rank - layer.A.shape[1]
                if carried:
                    assert runner.merger is not None
                    _carry(runner.merger, layer, left[:, :carried], right[:, :carried])
                layer.A.write_(left[:, carried:])
                layer.B.write_(right[:, carried:])
        logger.info("starting from the adapter %s", self.name)
        if self.trained and (change := as_trained(self.trained, self.args, scalings)):
            logger.warning(
                "the adapter was trained with other options, so this run's steps differ from "
                "those: to train as before, set %s",
                change,
            )

    def _read_scaling(self) -> SavedScaling:
        path = self._find(CONFIG_FILE, "name a folder that an adapter was saved in")
        try:
            config = json.loads(Path(path).read_text())
        except OSError as error:
            raise self._refuse(f"{CONFIG_FILE} cannot be read: {error}") from error
        except (ValueError, RecursionError) as error:
            raise self._refuse(f"{CONFIG_FILE} is no JSON: {error}") from error
        if not isinstance(config, dict):
            raise self._refuse(f"{CONFIG_FILE} is no JSON object: name another adapter")
        if reason := not_plain_lora(config):
            raise self._refuse(f"it {reason}: name a plain LoRA adapter")
        try:
            return SavedScaling(config)
        except ValueError as error:
            raise self._refuse(
                f"its lora_alpha or alpha_pattern is damaged: {error}: correct {CONFIG_FILE}"
            ) from error

    def _read_header(self) -> tuple[dict[str, tuple[int, int, int]], TrainedScaling | None]:
        try:
            with safe_open(self.file, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                shapes = {key: tuple(x.get_shape()) for key, x in slices.items()}
                dtypes = {key: x.get_dtype() for key, x in slices.items()}
                metadata = file.metadata()
        except OSError as error:
            raise self._refuse(f"{WEIGHTS_FILE} cannot be read: {error}") from error
        except SafetensorError as error:
            raise self._refuse(f"{WEIGHTS_FILE} is damaged: {error}") from error
        layers = {key: layer_of(key) for key in shapes}
        for key, layer in layers.items():
            if layer is None:
                raise self._refuse(f"{key} is not LoRA's on a linear layer: name another adapter")
            if dtypes[key] not in DTYPES:
                raise self._refuse(
                    f"{key} has dtype {dtypes[key]}: save it in one of {', '.join(DTYPES)}"
                )
        sizes = {}
        for layer in dict.fromkeys(filter(None, layers.values())):
            a, b = (shapes.get(key, ()) for key in saved_names(layer))
            if len(a) != 2 or len(b) != 2 or a[1] != b[0] or 0 in (*a, *b):
                raise self._refuse(f"the factors of {layer} do not fit together: save it again")
            sizes[layer] = (a[0], b[1], a[1])
        if not sizes:
            raise self._refuse(f"{WEIGHTS_FILE} is empty: name another adapter")
        try:
            ranks = {layer: rank for layer, (_, _, rank) in sizes.items()}
            return sizes, TrainedScaling.read(metadata, ranks)
        except ValueError as error:
            raise self._refuse(
                f"the {TrainedScaling.KEY} entry of its metadata is damaged: {error}: save the "
                "tensors without it"
            ) from error

    def _find(self, file: str, hint: str) -> str:
        try:
            path = cached_file(self.name, file, **self._given)
        except (OSError, ValueError) as error:
            raise self._refuse(str(error).strip().splitlines()[0]) from error
        if path is None:
            raise self._refuse(f"it has no {file}: {hint}")
        return path

    def _refuse(self, reason: str) -> UserError:
        # Names and values of the files may have line breaks, or codes that a terminal acts on.
        printable = "".join(x if x.isprintable() else " " for x in reason)
        return UserError(f"--adapter_name_or_path {self.name}: {printable}")


def as_trained(
    trained: TrainedScaling, args: MethodArguments, scalings: Mapping[str, float]
) -> str | None:
    """The options with which a run trains A and B as they were trained before.

    Args:
        trained: options and scales of the training before.
        args: the method's options of this run.
        scalings: {layer: s} of this run.

    Returns:
        the options to set; None: this run's rank and scales are those already.
    """
    same = all(math.isclose(trained.scalings[layer], s) for layer, s in scalings.items())
    if same and trained.args.rank == args.rank:
        return None
    return trained.differing(args)


def _carry(merger: Merger, layer: LayerShards, left: Tensor, right: Tensor) -> None:
    """Write ``left rightᵀ`` to the layer's carry, without the zero columns at the end.

    Args:
        left: factor (m, R) float32.
        right: factor (n, R) float32.
    """
    used = ((left != 0).any(0) & (right != 0).any(0)).nonzero()
    count = int(used.max()) + 1 if len(used) else 0
    merger.target.add(layer, left[:, :count], right[:, :count])
