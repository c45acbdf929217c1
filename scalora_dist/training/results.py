"""Writes the results of a finished run: summary.json, the adapter, the merged model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scalora_dist.config.options import Options
from scalora_dist.methods.runner import MethodRunner
from scalora_dist.model_io.export_adapter import AdapterExport
from scalora_dist.model_io.export_model import export_model
from scalora_dist.profiling.memory import peak_memory_bytes
from scalora_dist.training.evaluate import Evaluation
from scalora_dist.training.run_log import write_json
from scalora_dist.training.summary import summarize
from scalora_dist.training.update_rank import UpdateRank


class Results:
    """Writes a run's results.

    Construct it before the first step, because some results compare with the initial weights.
    """

    def __init__(self, runner: MethodRunner, options: Options) -> None:
        """
        Args:
            runner: the runner of the method. Its engine must hold the weights as loaded.

        Raises:
            UserError: on every rank, where the initial weights must be read again and cannot be.
        """
        self.runner = runner
        self.options = options
        engine = runner.engine
        self.adapter = AdapterExport(engine, options, edits_weights=runner.edits_weights)
        count = options.train.update_rank_layers
        self.update_rank = UpdateRank(engine, count) if count else None

    def write(
        self,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        records: list[dict[str, Any]],
        evaluations: Sequence[Evaluation | None],
    ) -> dict[str, Any]:
        """Write all results. Returns the contents of summary.json. Called on every rank.

        Args:
            records: the steps' lines of metrics.jsonl.
            evaluations: the evaluations before the first step and after the last. None without
                held-out data.
        """
        runner, options = self.runner, self.options
        engine, low_halves = runner.engine, runner.low_halves
        ranks = self.update_rank.measure(low_halves) if self.update_rank else []
        (peak,) = engine.world.max(peak_memory_bytes(engine.world.device))
        before, after = evaluations
        summary = summarize(
            options,
            records,
            before,
            after,
            world_size=engine.world.size,
            rank=options.method.rank if "rank" in runner.method.options else None,
            parameters=runner.parameters,
            update_rank=ranks,
            carry=runner.merger.target.summary() if runner.merger else {},
            peak_memory_bytes=int(peak),
        )
        if engine.world.is_main:
            write_json(folder / "summary.json", summary)
        self.adapter.write(folder / "adapter", low_halves)
        if options.train.save_model:
            export_model(folder / "model", engine, model, tokenizer, low_halves)
        return summary
