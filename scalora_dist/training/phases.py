"""Records in phase.json which phases of a run are finished, so that a resume repeats none."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scalora_dist.distributed.world import World
from scalora_dist.training.evaluate import Evaluation
from scalora_dist.training.run_log import write_json

logger = logging.getLogger(__name__)

# In order. Before "start" is finished, an earlier run's results are being moved out of the way.
PHASES = ("start", "training", "evaluation", "adapter", "model", "summary", "upload")
FILE = "phase.json"


class Phases:
    """The phases of a run that are finished. The same on every rank; rank 0 writes phase.json.

    Attributes:
        folder: the run's ``output_dir``.
        world: the ranks.
        finished: the last finished phase; None: not even "start".
        step: number of steps at the end of training; 0 before.
        saved: whether the checkpoint of the last step is written.
        wanted: the options that decide what the last phases write.
        found: what the finished phases found out, for the summary. JSON values.
    """

    def __init__(self, folder: Path, world: World, wanted: dict[str, Any]) -> None:
        self.folder = folder
        self.world = world
        self.finished: str | None = None
        self.step = 0
        self.saved = True
        self.wanted = wanted
        self.found: dict[str, Any] = {}

    def done(self, phase: str) -> bool:
        return self.finished is not None and PHASES.index(phase) <= PHASES.index(self.finished)

    def begin(self) -> None:
        """Record that no phase is finished: the folder's content is about to be moved. Rank 0 only.

        Raises:
            OSError: it cannot be recorded, so nothing may be moved.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(None, {})

    def started(self) -> None:
        """Record that the folder is this run's. Rank 0 only: the others do not ask before the end.

        Raises:
            OSError: it cannot be recorded. A resume would take this run's checkpoints for old ones.
        """
        self._write("start", {})

    def trained(self, step: int, *, saved: bool) -> None:
        """Record that all ``step`` steps are trained.

        Args:
            saved: whether their checkpoint is written. If not, a resume trains the last steps
                again, so no later phase is recorded before the end.
        """
        self.step = step
        self.saved = saved
        self._set("training", {})

    def finish(self, phase: str, written: Iterable[Path] = (), **found: Any) -> None:
        """Record that a phase after the training is finished.

        Args:
            written: the files that the phase wrote. Only rank 0's count.
            found: what the phase found out. JSON values.
        """
        files = dict(self.found.get("written", {}))
        if self.world.is_main:
            files |= {str(f.relative_to(self.folder)): f.stat().st_size for f in written}
        self._set(phase, {**self.found, **found, "written": files})

    def restore(self, step: int) -> None:
        """Take over the phases that an earlier process of this run finished. A collective.

        "training" is the last one if the options of the later ones have changed, or if what they
        wrote is no longer there.

        Args:
            step: number of steps of the whole run, all of which the checkpoint has.
        """
        saved = self.world.json_from_rank_0(lambda: _later_phases(self.folder))
        self.finished, self.step = "training", step
        if (saved.get("step"), saved.get("wanted")) == (step, self.wanted):
            self.finished, self.found = saved["finished"], saved["found"]

    def _set(self, finished: str, found: dict[str, Any]) -> None:
        self.finished, self.found = finished, found
        recorded = self.saved or finished == PHASES[-1]
        if not self.world.is_main or not recorded:
            return
        try:
            self._write(finished, found)
        except OSError as error:  # a full disk: a resume repeats the phase
            logger.warning("%s: %s", self.folder / FILE, error.strerror)

    def _write(self, finished: str | None, found: dict[str, Any]) -> None:
        record = {"finished": finished, "step": self.step, "wanted": self.wanted, "found": found}
        write_json(self.folder / FILE, record)


def interrupted_start(folder: Path) -> bool:
    """Whether a run was killed while it moved an earlier run's results out of the way."""
    return _read(folder).get("finished", "") is None


def _read(folder: Path) -> dict[str, Any]:
    """The contents of phase.json. Empty if it is missing or damaged."""
    try:
        saved = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    fields = {"finished", "step", "wanted", "found"}
    return saved if isinstance(saved, dict) and saved.keys() == fields else {}


def _later_phases(folder: Path) -> dict[str, Any]:
    """The contents of phase.json, if a phase after the training is finished. Else empty.

    Also empty if what the summary needs is missing, or a file that a phase wrote.
    """
    saved = _read(folder)
    if saved.get("finished") not in PHASES[2:]:
        return {}
    found = saved["found"]
    try:
        Evaluation.restored(found["after"])
        int(found["peak_memory_bytes"])
        sum(found["update_rank"])
        sizes = {str(name): int(size) for name, size in found["written"].items()}
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return saved if whole else {}
