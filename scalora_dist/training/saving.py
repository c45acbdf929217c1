"""When a run is saved, and what ends it early: a signal, a full disk, steps that stay NaN."""

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
# Left in output_dir by a run that was asked to stop: torchrun does not pass its ranks' status on.
PREEMPTED = "preempted"
logger = logging.getLogger(__name__)


def check_shared(checkpoints: Checkpoints, train: TrainArguments) -> None:
    """Every rank writes its part of a checkpoint, and any may read it.

    Raises:
        UserError: on every rank, where nodes have an ``output_dir`` each and would save there.
    """
    if not (missing := checkpoints.unshared()):
        return
    sentence = f"--output_dir {train.output_dir} is not shared: {missing} node(s) do not see it"
    if train.save_steps:
        raise UserError(f"{sentence}: name a folder on a disk of all nodes, or --save_steps 0")
    logger.warning("%s, so that a signal will end the run without a checkpoint", sentence)


class SavePolicy:
    """Saves every ``save_steps`` steps and when asked to stop; ends the run where it must.

    A save that falls on a skipped step waits for the next good one.

    Attributes:
        signals: to be entered around the loop.
    """

    def __init__(self, checkpoints: Checkpoints, train: TrainArguments) -> None:
        self.checkpoints = checkpoints
        self.train = train
        self.world = checkpoints.world
        self.signals = StopSignals()
        self._failure: str | None = None
        self._due = False

    def votes(self) -> list[float]:
        """Whether this rank was asked to stop, and whether the last save failed.

        To be summed over ranks on the way, so that all stop after the same step.
        """
        self._settle(wait=False)
        return [float(self.signals.received is not None), float(self._failure is not None)]

    def after(
        self, step: int, records: Sequence[dict[str, Any]], votes: Sequence[float], save: Save
    ) -> None:
        """Save the moment after ``step`` where it is time; the same on all ranks.

        Args:
            records: of all steps so far.
            votes: of this step, summed over ranks.
            save: begins a checkpoint.

        Raises:
            Preempted: a rank was asked to stop, and all is saved.
            UserError: the run cannot go on.
        """
        asked, failed = votes
        skipped = skipped_in_a_row(records)
        self._due |= bool(self.train.save_steps) and step % self.train.save_steps == 0
        # A skipped step changed nothing: its checkpoint would only push out one that is known good.
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
                with suppress(OSError):  # the checkpoint has taken the last of the disk
                    (self.checkpoints.output_dir / PREEMPTED).write_text(f"{step}\n")
            self.world.sum(0.0)  # no rank leaves, and the launcher with it, before all is done
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
