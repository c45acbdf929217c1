"""Decides when to save, and ends a run early: on a signal, failed saves, or many skipped steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from scalora_dist.checkpoint.manifest import checkpoint_folder, step_of
from scalora_dist.checkpoint.storage import Checkpoints
from scalora_dist.config.training import TrainArguments
from scalora_dist.distributed.stop_signals import StopSignals, mark_preempted
from scalora_dist.distributed.watchdog import Watchdog
from scalora_dist.errors import Preempted, UserError

Save = Callable[[int], None]
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
        raise UserError(f"{sentence}: name a folder that all nodes share, or set --save_steps 0")
    logger.warning("%s, so that a signal will end the run without a checkpoint", sentence)


class StopAsked(Exception):
    """A signal asked to stop in the middle of an evaluation. Raised on all ranks."""


class SavePolicy:
    """Saves every ``save_steps`` steps, at the end, and on a stop signal. Ends the run early.

    A save that is due at a skipped step waits for the next step that is not skipped.

    Attributes:
        signals: records stop signals.
        saved: the step of the newest checkpoint that this run has begun to write or resumed from.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        train: TrainArguments,
        signals: StopSignals,
        watchdog: Watchdog,
    ) -> None:
        self.checkpoints = checkpoints
        self.train = train
        self.world = checkpoints.world
        self.signals = signals
        self.watchdog = watchdog
        self.saved = 0
        self._failure: str | None = None
        self._due = False

    def votes(self) -> list[float]:
        """Two flags, 1.0 or 0.0: this rank was asked to stop; its last save failed.

        The caller sums them over ranks, so that all ranks stop after the same step.
        """
        self._take_outcome(wait=False)
        return [float(self.signals.received is not None), float(self._failure is not None)]

    def check_asked(self) -> None:
        """Raise StopAsked on all ranks if one of them was asked to stop: one all-reduce."""
        if self.world.sum(self.signals.received is not None) != [0.0]:
            raise StopAsked

    def after(self, step: int, skipped: int, votes: Sequence[float], save: Save) -> None:
        """Save after ``step`` if it is time, and end the run if needed. The same on all ranks.

        Args:
            step: number of steps so far.
            skipped: number of skipped steps in a row, this step included.
            votes: what ``votes`` returned at this step, summed over ranks.
            save: begins to write a checkpoint.

        Raises:
            Preempted: a rank was asked to stop, and the checkpoint is written.
            UserError: a save failed and the run must stop, or ``max_skipped_steps`` steps in a row
                were skipped.
        """
        asked, failed = votes
        self._due |= bool(self.train.save_steps) and step % self.train.save_steps == 0
        # A skipped step changed nothing: its checkpoint would only replace an older good one.
        due = self._due and not skipped
        if asked or due or failed:
            self._take_outcome(wait=True)
            if self._failure and self.train.on_save_failure == "stop":
                self._give_up()
            self._failure = None
        if asked or due:
            self._save(step, save)
        if asked:
            self._take_outcome(wait=True)
            if self._failure:
                self._give_up()
            if self.world.is_main:
                mark_preempted(self.checkpoints.output_dir, step)
            self.world.sum(0.0)  # a barrier: a rank that exits early ends the launcher
            raise Preempted(
                f"stopped by {self.signals.received or 'a signal'} after step {step}; "
                f"{checkpoint_folder(self.checkpoints.output_dir, step)} is written: "
                "go on with --resume_from_checkpoint latest"
            )
        if skipped >= self.train.max_skipped_steps:
            self._take_outcome(wait=True)
            raise UserError(
                f"loss or gradients were not finite for {skipped} steps in a row, from step "
                f"{step - skipped + 1} on; {self._last_good(step - skipped)}"
            )

    def finish(self, step: int, save: Save) -> bool:
        """Save after the last step, and wait until the checkpoint is written.

        Args:
            step: number of steps of the run.
            save: begins to write a checkpoint.

        Returns:
            whether the trained state is saved. It is not where nodes have separate folders.

        Raises:
            UserError: it could not be written, and ``on_save_failure`` is stop.
        """
        self._take_outcome(wait=True)
        if self._failure and self.train.on_save_failure == "stop":
            self._give_up()
        if not self.checkpoints.shared:
            return False
        if self._failure or self.saved != step:
            self._failure = None
            self._save(step, save)
            self._take_outcome(wait=True)
        if self._failure and self.train.on_save_failure == "stop":
            self._give_up()
        return self._failure is None

    def _save(self, step: int, save: Save) -> None:
        save(step)
        self.saved = step
        self._due = False

    def _take_outcome(self, *, wait: bool) -> None:
        """Note why the last save failed, if it did."""
        if wait:
            self.watchdog.pause(idle=True)
        failure = self.checkpoints.outcome(wait=wait)
        if wait:
            self.watchdog.pause()
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
