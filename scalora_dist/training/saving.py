"""Decides when to save, and ends a run early: on a signal, failed saves, or many skipped steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from scalora_dist.checkpoint.manifest import checkpoint_folder, step_of
from scalora_dist.checkpoint.storage import Checkpoints
from scalora_dist.config.training import TrainArguments
from scalora_dist.distributed.stop_signals import StopSignals
from scalora_dist.errors import Preempted, UserError
from scalora_dist.training.health import skipped_in_a_row

Save = Callable[[int], None]
# Name of the file in output_dir that marks a run stopped by a signal. torchrun does not pass on
# the exit status of its ranks.
PREEMPTED = "preempted"
logger = logging.getLogger(__name__)


def check_shared(checkpoints: Checkpoints, train: TrainArguments) -> None:
    """Check that all nodes share ``output_dir``: every rank saves its part of a checkpoint there.

    A collective. Only warns if the run saves no checkpoints.

    Raises:
        UserError: on every rank, where nodes have separate folders and ``save_steps`` is set.
    """
    if not (missing := checkpoints.unshared()):
        return
    sentence = f"--output_dir {train.output_dir} is not shared: {missing} node(s) do not see it"
    if train.save_steps:
        raise UserError(f"{sentence}: name a folder on a disk of all nodes, or --save_steps 0")
    logger.warning("%s, so that a signal will end the run without a checkpoint", sentence)


class SavePolicy:
    """Saves every ``save_steps`` steps and on a stop signal. Ends the run where it must.

    A save that is due at a skipped step waits for the next step that is not skipped.

    Attributes:
        signals: context manager that notes stop signals; enter it around the loop.
    """

    def __init__(self, checkpoints: Checkpoints, train: TrainArguments) -> None:
        self.checkpoints = checkpoints
        self.train = train
        self.world = checkpoints.world
        self.signals = StopSignals()
        self._failure: str | None = None
        self._due = False

    def votes(self) -> list[float]:
        """Two flags, 1.0 or 0.0: this rank was asked to stop; its last save failed.

        The caller sums them over ranks, so that all ranks stop after the same step.
        """
        self._settle(wait=False)
        return [float(self.signals.received is not None), float(self._failure is not None)]

    def after(
        self, step: int, records: Sequence[dict[str, Any]], votes: Sequence[float], save: Save
    ) -> None:
        """Save after ``step`` if it is time, and end the run if needed. The same on all ranks.

        Args:
            step: number of steps so far.
            records: lines of metrics.jsonl of all steps so far.
            votes: what ``votes`` returned at this step, summed over ranks.
            save: begins to write a checkpoint.

        Raises:
            Preempted: a rank was asked to stop, and the checkpoint is written.
            UserError: a save failed and the run must stop, or ``max_skipped_steps`` steps in a row
                were skipped.
        """
        asked, failed = votes
        skipped = skipped_in_a_row(records)
        self._due |= bool(self.train.save_steps) and step % self.train.save_steps == 0
        # A skipped step changed nothing: its checkpoint would only replace an older good one.
        due = self._due and not skipped
        if asked or due or failed:
            self._settle(wait=True)
            if self._failure and self.train.on_save_failure == "stop":
                self._give_up()
            self._failure = None
        if asked or due:
            save(step)
            self._due = False
        if asked:
            self._settle(wait=True)
            if self._failure:
                self._give_up()
            if self.world.is_main:
                with suppress(OSError):  # the checkpoint may have filled the disk
                    (self.checkpoints.output_dir / PREEMPTED).write_text(f"{step}\n")
            self.world.sum(0.0)  # a barrier: a rank that exits early ends the launcher
            raise Preempted(
                f"stopped by {self.signals.received or 'a signal'} after step {step}; "
                f"{checkpoint_folder(self.checkpoints.output_dir, step)} is written: "
                "go on with --resume_from_checkpoint latest"
            )
        if skipped >= self.train.max_skipped_steps:
            self._settle(wait=True)
            raise UserError(
                f"loss or gradients were not finite for {skipped} steps in a row, from step "
                f"{step - skipped + 1} on; {self._last_good(step - skipped)}"
            )

    def finish(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            UserError: it could not be written, and ``on_save_failure`` is stop.
        """
        self._settle(wait=True)
        if self._failure and self.train.on_save_failure == "stop":
            self._give_up()

    def _settle(self, *, wait: bool) -> None:
        failure = self.checkpoints.outcome(wait=wait)
        if failure:
            self._failure = failure
            logger.warning("%s; earlier checkpoints are intact", failure)

    def _give_up(self) -> None:
        raise UserError(
            f"{self._failure}; earlier checkpoints are intact: free some space, then go on with "
            "--resume_from_checkpoint latest"
        )

    def _last_good(self, step: int) -> str:
        for folder in self.checkpoints.newest_first():
            if (step_of(folder) or 0) <= step:
                return (
                    f"the last good checkpoint is {folder}: go on from it with a smaller "
                    "--learning_rate and another --output_dir"
                )
        return "there is no checkpoint from before: start again with a smaller --learning_rate"
