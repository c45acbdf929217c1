"""How far a run is, and what it remembers of its past. A checkpoint holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from scalora_dist.training.evaluate import Evaluation
from scalora_dist.training.health import Health
from scalora_dist.training.summary import Tally


@dataclass
class Progress:
    """How far a run is, and what it must remember of its past.

    Attributes:
        first_step: the step that this process began at, counted from 0.
        steps_taken: number of steps since the run's first that were not skipped.
        health: what decisions need of the last steps.
        tally: what the summary needs of all steps.
        before: the evaluation before the first step, or None.
        history: on rank 0, all lines of metrics.jsonl before ``first_step``; else empty.
    """

    first_step: int = 0
    steps_taken: int = 0
    health: Health = field(default_factory=Health)
    tally: Tally = field(default_factory=Tally)
    before: Evaluation | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def note(self, record: dict[str, Any]) -> None:
        """Take a step's line of metrics.jsonl into account."""
        self.health.note(record)
        self.tally.note(record)

    def state(self) -> dict[str, Any]:
        """The part of it that a checkpoint holds, as JSON values.

        It is a copy, because the checkpoint is written while training goes on.
        """
        return {
            "steps_taken": self.steps_taken,
            "health": dict(vars(self.health)),
            "tally": asdict(self.tally),
            "before": self.before and asdict(self.before),
        }

    @classmethod
    def restored(
        cls, saved: dict[str, Any], first_step: int, history: list[dict[str, Any]]
    ) -> Progress:
        """The progress whose ``state`` was saved after ``first_step`` steps."""
        progress = cls(first_step, saved["steps_taken"], history=history)
        vars(progress.health).update(saved["health"])
        progress.tally = Tally(**saved["tally"])
        progress.before = Evaluation.restored(saved["before"])
        return progress
