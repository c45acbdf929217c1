"""Writes what a run has trained as a LoRA adapter in PEFT's format, layer by layer from shards."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from scalora_dist.config.options import Options
from scalora_dist.core.layout import global_norm
from scalora_dist.core.sharded_svd import truncated_svd
from scalora_dist.errors import UserError
from scalora_dist.layers.adapted_linear import CoreLinear, LowRankLinear
from scalora_dist.layers.carry_linear import CarryLinear
from scalora_dist.model_io.base_weights import BaseWeights
from scalora_dist.model_io.merged_weights import MergedWeights
from scalora_dist.model_io.model_card import NAME as CARD
from scalora_dist.model_io.parameters import Parameters
from scalora_dist.model_io.peft_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    TrainedScaling,
    saved_config,
    saved_factors,
    saved_names,
)
from scalora_dist.model_io.safetensors_writer import SafetensorsWriter
from scalora_dist.model_io.serving import vllm_objections
from scalora_dist.model_io.whole_folder import written_aside

logger = logging.getLogger(__name__)


def check_adapter_rank(options: Options, *, merges: bool) -> None:
    """Check that ``--adapter_rank`` is only given for a run that merges into W.

    Args:
        options: the options after ``resolve``.
        merges: whether the method merges while it trains.

    Raises:
        UserError: ``--adapter_rank`` is given for a run that merges nothing into W.
    """
    args = options.method
    if options.train.adapter_rank is None or (merges and args.merge_target == "weight"):
        return
    target = f" with --merge_target {args.merge_target}" if args.merge_target else ""
    raise UserError(
        f"--adapter_rank is for runs that merge into W: --method {args.name}{target} writes its "
        "own adapter, if it has one; leave it out"
    )


class AdapterExport:
    """Writes the adapter of a run.

    The adapter has A and B. For a core, A = U R and B = V. The columns of a carry come before those
    of A and B. With ``--adapter_rank``, it is the best approximation of ΔW of that rank instead.

    A run that has none of these (PEFT's layers, MoRA, full) has no adapter.

    Attributes:
        args: options of the method.
        model: name of the base model.
        rank: value of ``--adapter_rank``; None: not given.
        before: reads W before training, for ``--adapter_rank``; else None.
    """

    def __init__(self, options: Options, before: BaseWeights | None) -> None:
        """
        Args:
            options: the run's options, with which it writes an adapter.
            before: the base model; only needed with ``--adapter_rank``.
        """
        self.args = options.method
        self.model = str(options.model.model_name_or_path)
        self.rank = options.train.adapter_rank
        self.before = before if self.rank is not None else None

    @torch.no_grad()
    def write(
        self,
        folder: Path,
        parameters: Parameters,
        card: str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Write the adapter. Collective: called on every rank, only rank 0 writes.

        The factors are gathered one layer at a time.

        Args:
            folder: folder of the adapter; replaced if it exists.
            parameters: of the trained model and its method.
            card: text of README.md.
            dtype: dtype of the saved factors.
        """
        is_main, rank = parameters.rank == 0, self._rank()
        merged = MergedWeights(parameters)
        sizes = {name: parameters.shape(f"{name}.weight") for name in parameters.adapted}
        entries: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for name, (m, n) in sizes.items():
            shapes = torch.Size([m, rank]), torch.Size([rank, n])
            keys = zip(saved_names(name), shapes, strict=True)
            entries |= {key: (shape, dtype) for key, shape in keys}
        errors: dict[str, float] = {}
        quiet = None if is_main else True
        with written_aside(folder, is_main=is_main) as aside:
            with open(aside / WEIGHTS_FILE if is_main else os.devnull, "wb") as file:
                writer = SafetensorsWriter(file, entries, self._trained(parameters.adapted))
                for name in tqdm(sizes, "writing the adapter", disable=quiet, leave=False):
                    if self.before is None:
                        a, b, scaling = self._own_factors(merged, name)
                    else:
                        scaling = 1.0
                        columns = min(rank, *sizes[name])
                        a, b, errors[name] = self._approximation(merged, name, columns)
                    if is_main:
                        for tensor in saved_factors(a, b, scaling, rank):
                            writer.write(tensor.to(dtype))
            if is_main:
                config = saved_config(self.model, parameters.modules, sizes, rank)
                (aside / CONFIG_FILE).write_text(json.dumps(config, indent=2))
                (aside / CARD).write_text(card)
                if errors:
                    report = {"rank": self.rank, "relative_error": errors}
                    (aside / "approximation.json").write_text(json.dumps(report, indent=2))
        if is_main and (objections := vllm_objections(sizes, rank)):
            logger.warning(
                "vLLM may not serve the adapter, and then needs the merged model: %s", objections
            )
        if errors:
            worst = max(errors, key=lambda name: errors[name])
            logger.info(
                "the adapter of rank %d misses %.3g of the update on average, at most %.3g (%s)",
                self.rank,
                sum(errors.values()) / len(errors),
                errors[worst],
                worst,
            )

    def _rank(self) -> int:
        """r of the saved adapter."""
        if self.rank is not None:
            return self.rank
        carried = (self.args.carry_rank or 0) if self.args.merge_target == "carry" else 0
        return carried + self.args.rank

    def _trained(self, layers: Mapping[str, nn.Module]) -> dict[str, str] | None:
        """Metadata with the s of each layer, if the saved factors are those that are trained."""
        scalings = {n: x.scaling for n, x in layers.items() if isinstance(x, LowRankLinear)}
        if self.rank is not None or len(scalings) < len(layers):
            return None
        return TrainedScaling(self.args, scalings).metadata()

    def _own_factors(self, merged: MergedWeights, name: str) -> tuple[Tensor, Tensor, float]:
        """The full A (m, columns) and B (n, columns), float32, and s. Collective."""

        def part(key: str) -> Tensor:
            return merged.precise(f"{name}.{key}").float()

        module = merged.parameters.adapted[name]
        if isinstance(module, CoreLinear):
            return part("U") @ part("R"), part("V"), module.scaling
        assert isinstance(module, LowRankLinear)
        a, b = part("A"), part("B")
        if isinstance(module, CarryLinear):  # compressed to carry_rank columns at the end
            kept = self.args.carry_rank
            a, b = torch.cat([part("C")[:, :kept], a], 1), torch.cat([part("D")[:, :kept], b], 1)
        return a, b, module.scaling

    def _approximation(
        self, merged: MergedWeights, name: str, rank: int
    ) -> tuple[Tensor, Tensor, float]:
        """A = U √S (m, r) and B = V √S (n, r) of ΔW's truncated SVD, and ‖ΔW − A Bᵀ‖ / ‖ΔW‖.

        A and B are float32. Collective. Each rank uses its own range of W, and W is not gathered.
        """
        module = merged.parameters.adapted[name]
        assert self.before is not None and isinstance(module, LowRankLinear)
        key, device = f"{name}.weight", merged.parameters.device
        weight = merged.parameters.shard(key)
        update = weight.like(weight.local.float() - self.before.range(key, weight))
        here = update.local.device
        a, b = (merged.precise(f"{name}.{x}").float().to(here) for x in "AB")
        update.add_low_rank_(module.scaling * a, b)
        norm = float(global_norm([update], device))
        svd = truncated_svd(update, rank, device=device)
        root = svd.S.sqrt()
        a, b = ((side * root).float() for side in (svd.U, svd.V))
        update.add_low_rank_(-a, b)
        missed = float(global_norm([update], device))
        return a, b, missed / norm if norm else 0.0
