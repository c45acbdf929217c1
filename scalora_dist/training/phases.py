"""Records in phase.json which phases of a run are finished, so that a resume repeats none."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scalora_dist.checkpoint.storage import Checkpoints
from scalora_dist.training.run_log import write_json

logger = logging.getLogger(__name__)

# In order. Before "start" is finished, an earlier run's results are being moved out of the way.
PHASES = ("start", "training", "evaluation", "adapter", "model", "summary")
FILE = "phase.json"


class Phases:
    """The phases of a run that are finished. The same on every rank; rank 0 writes phase.json.

    Attributes:
        folder: the run's ``output_dir``.
        finished: the last finished phase; None: not even "start".
        step: number of steps at the end of training; 0 before.
        wanted: the options that decide what the last phases write.
        found: what the finished phases found out, for the summary. JSON values.
    """

    def __init__(self, checkpoints: Checkpoints, wanted: dict[str, Any]) -> None:
        self.checkpoints = checkpoints
        self.folder = checkpoints.output_dir
        self.finished: str | None = None
        self.step = 0
        self.wanted = wanted
        self.found: dict[str, Any] = {}

    def done(self, phase: str) -> bool:
        return self.finished is not None and PHASES.index(phase) <= PHASES.index(self.finished)

    def begin(self) -> None:
        """Record that no phase is finished: the folder's content is about to be moved."""
        self._set(None, {})

    def started(self) -> None:
        """Record that the folder is this run's."""
        self._set("start", {})

    def trained(self, step: int) -> None:
        """Record that all ``step`` steps are trained and saved."""
        self.step = step
        self._set("training", {})

    def finish(self, phase: str, written: Sequence[str] = (), **found: Any) -> None:
        """Record that a phase after the training is finished.

        Args:
            written: names of what the phase wrote to the folder.
            found: what the phase found out. JSON values.
        """
        files = [*self.found.get("written", []), *written]
        self._set(phase, {**self.found, **found, "written": files})

    def restore(self, step: int) -> None:
        """Take over the phases that an earlier process of this run finished. A collective.

        "training" is the last one if the options of the later ones have changed, or if what they
        wrote is no longer there.

        Args:
            step: number of steps of the whole run, all of which the checkpoint has.
        """
        saved = self.checkpoints.from_rank_0(lambda: _read(self.folder))
        self.finished, self.step = "training", step
        whole = isinstance(saved.get("found"), dict) and saved.get("finished") in PHASES[2:]
        if whole and (saved.get("step"), saved.get("wanted")) == (step, self.wanted):
            self.finished, self.found = saved["finished"], saved["found"]

    def _set(self, finished: str | None, found: dict[str, Any]) -> None:
        self.finished, self.found = finished, found
        if not self.checkpoints.world.is_main:
            return
        record = {"finished": finished, "step": self.step, "wanted": self.wanted, "found": found}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / FILE, record)
        except OSError as error:  # a full disk: a resume repeats the phase
            logger.warning("%s: %s", self.folder / FILE, error.strerror)


def interrupted_start(folder: Path) -> bool:
    """Whether a run was killed while it moved an earlier run's results out of the way."""
    return _read(folder).get("finished", "") is None


def _read(folder: Path) -> dict[str, Any]:
    """The contents of phase.json. Empty if it is missing or damaged.

    "training" is the last finished phase if what a later one wrote is no longer there.
    """
    try:
        saved = json.loads((folder / FILE).read_bytes())
        written = saved["found"].get("written", [])
        if not all((folder / str(name)).exists() for name in written):
            saved["finished"] = "training"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return dict(saved)
