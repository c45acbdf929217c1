"""Writes the results of a run, in phases that a resume repeats alone; the last one uploads them."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from scalora_dist.checkpoint.manifest import LIBRARIES, prune, step_of
from scalora_dist.checkpoint.storage import Checkpoints
from scalora_dist.config.model import ModelArguments
from scalora_dist.config.options import Options
from scalora_dist.methods.runner import MethodRunner
from scalora_dist.model_io.model_card import model_card, names_on_hub, without_paths
from scalora_dist.profiling.memory import peak_memory_bytes
from scalora_dist.profiling.versions import installed_versions
from scalora_dist.training.evaluate import Evaluation
from scalora_dist.training.exports import Exports
from scalora_dist.training.output_dir import clear_partial, discard_replaced, set_aside
from scalora_dist.training.phases import Phases
from scalora_dist.training.run_log import disk_errors_told, write_json
from scalora_dist.training.summary import Tally, summarize
from scalora_dist.training.update_rank import UpdateRank
from scalora_dist.training.upload import upload


class Results:
    """Writes a run's results.

    Construct it before the first step, because some results compare with the initial weights.

    Attributes:
        folder: the run's ``output_dir``.
        repository: where the results are uploaded to, account/name; None: nowhere.
        phases: which phases of the run are finished.
    """

    def __init__(
        self,
        runner: MethodRunner,
        options: Options,
        model: ModelArguments,
        checkpoints: Checkpoints,
        repository: str | None = None,
    ) -> None:
        """
        Args:
            runner: the runner of the method. Its engine must hold the weights as loaded.
            options: the run's options, as results record them.
            model: the options to read the base model by.
            checkpoints: the run's checkpoints.
            repository: as the attribute.

        Raises:
            UserError: on every rank, where the exports must read the base model again and cannot.
        """
        self.runner = runner
        self.options = options
        self.folder = checkpoints.output_dir
        self.repository = repository
        self.exports = Exports(runner, options, model)
        # What is a path is known now; its folder may be gone at the end.
        self.public = without_paths(options, names_on_hub(options))
        self.update_rank = (
            UpdateRank(runner, options, model) if options.train.update_rank_layers else None
        )
        names = ("save_model", "adapter_rank", "update_rank_layers")
        wanted = {name: getattr(options.train, name) for name in names}
        self.phases = Phases(checkpoints.output_dir, checkpoints.world, wanted)

    def clear(self, *, resumed: bool = False) -> None:
        """Move the results of an earlier run out of the way, until this run's are whole.

        Args:
            resumed: whether this run goes on from the checkpoints and logs that are there.
        """

        def clear() -> None:
            with disk_errors_told(self.folder):
                if not resumed:
                    self.phases.begin()
                set_aside(self.folder, everything=not resumed)
                self.phases.started()

        self.runner.engine.world.main_only(clear)

    def go_on(self, checkpoint: Path, keep: int) -> None:
        """Go on after the last step, with the phases that an earlier process has not finished.

        Args:
            checkpoint: the checkpoint of the last step.
            keep: number of checkpoints to keep.
        """
        self.phases.restore(step_of(checkpoint) or 0)

        def clear() -> None:
            with disk_errors_told(self.folder):
                clear_partial(self.folder)
                prune(self.folder, keep, newest=self.folder / checkpoint.name)
                if not self.phases.done("summary"):  # it is written last
                    (self.folder / "summary.json").unlink(missing_ok=True)

        self.runner.engine.world.main_only(clear)

    def evaluated(self, after: Evaluation | None) -> None:
        """Finish the phase "evaluation". A collective.

        Args:
            after: the evaluation after the last step. None without held-out data.
        """
        runner = self.runner
        (peak,) = runner.engine.world.max(peak_memory_bytes(runner.engine.world.device))
        self.phases.finish(
            "evaluation",
            after=after and asdict(after),
            update_rank=self.update_rank.measure(runner.low_halves) if self.update_rank else [],
            peak_memory_bytes=int(peak),
        )

    def write(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tally: Tally,
        before: Evaluation | None,
        chat_turns: dict[str, int],
    ) -> dict[str, Any]:
        """Write what an earlier process of this run has not written. Called on every rank.

        Args:
            tally: sums over all steps.
            before: the evaluation before the first step. None without held-out data.
            chat_turns: as `Prepared.turns`.

        Returns:
            the contents of summary.json, the last file that is written.

        Raises:
            UserError: on rank 0, where the disk is full or cannot be written; on every rank, where
                the upload fails.
        """
        summary = self._summary(tally, before, chat_turns)
        card = partial(
            model_card,
            options=self.public,
            summary=summary,
            versions=installed_versions(*LIBRARIES),
        )
        if not self.phases.done("adapter"):
            folder = self.folder / "adapter"
            with disk_errors_told(folder):
                written = self.exports.write_adapter(folder, card("adapter"))
            self.phases.finish("adapter", folder.glob("*") if written else ())
        if not self.phases.done("model"):
            folder = self.folder / "model"
            if self.options.train.save_model:
                with disk_errors_told(folder):
                    self.exports.write_model(folder, tokenizer, card("model"))
            self.phases.finish("model", folder.glob("*") if self.options.train.save_model else ())
        if not self.phases.done("summary"):
            file = self.folder / "summary.json"

            def finish() -> None:
                with disk_errors_told(file):
                    write_json(file, summary)
                discard_replaced(self.folder)

            world = self.runner.engine.world
            world.main_only(finish)  # the others wait: a signal must still reach them
            self.phases.finish("summary", [file])
        self._upload()
        return summary

    def _upload(self) -> None:
        """Upload the results, unless an earlier process of this run has done it."""
        repository, phases = self.repository, self.phases
        if repository and phases.found.get("uploaded_to") != repository:
            world, resumable = self.runner.engine.world, phases.saved
            world.main_only(
                lambda: upload(self.folder, repository, self.options, resumable=resumable)
            )
            phases.finish("upload", uploaded_to=repository)
        elif not phases.done("upload"):
            phases.finish("upload")

    def _summary(
        self, tally: Tally, before: Evaluation | None, chat_turns: dict[str, int]
    ) -> dict[str, Any]:
        runner, options, found = self.runner, self.options, self.phases.found
        return summarize(
            options,
            tally,
            before,
            Evaluation.restored(found["after"]),
            chat_turns=chat_turns,
            world_size=runner.engine.world.size,
            rank=options.method.rank if options.method.reads("rank") else None,
            parameters=runner.parameters,
            update_rank=found["update_rank"],
            carry=runner.merger.target.summary() if runner.merger else {},
            peak_memory_bytes=found["peak_memory_bytes"],
        )
