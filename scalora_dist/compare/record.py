"""The records of finished runs: runs.jsonl, all that the results are computed from."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scalora_dist.compare.runs import Cell, Run
from scalora_dist.compare.study import method_options
from scalora_dist.errors import UserError
from scalora_dist.profiling.versions import installed_versions

MOST_POINTS = 1000
DIGITS = 5
LIBRARIES = ("scalora_dist", "torch", "transformers", "datasets", "deepspeed", "peft", "numpy")
OUTPUT = "output"  # a run's output_dir, in the run's folder, until its record is written
OPTIONS = "options.json"  # of the run in OUTPUT
LOG = "log"
KEPT = ("metrics.jsonl", "summary.json", "model")  # a model is there with --save_model only


class Records:
    """runs.jsonl of a study. Inside ``with`` records can be added, by one process at a time.

    Attributes:
        path: the file.
        lines: the records, in the order in which the runs finished.
    """

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: the file; it need not exist.

        Raises:
            UserError: a line is damaged.
        """
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._read()

    def _read(self) -> int:
        """Read the whole lines. Returns their bytes; a killed process may have left more."""
        whole = _whole_lines(self.path)
        try:
            self.lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            message = f"{self.path} is damaged ({error}): delete the damaged line"
            raise UserError(message) from error
        return len(whole)

    def __enter__(self) -> Records:
        """
        Raises:
            UserError: another process adds records, or the disk has no locks.
        """
        self._file = open(self.path, "ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{self.path.parent}: another scalora compare works there: wait for it"
            ) from error
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be locked ({error.strerror}): name an --output_dir on a disk "
                "with file locks"
            ) from error
        self._file.truncate(self._read())
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, record: dict[str, Any]) -> None:
        """Add a record. It is on the disk when this returns."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines.append(record)

    def finished(self) -> dict[Run, dict[str, Any]]:
        """{run: its record}."""
        return {run_of(record): record for record in self.lines}


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _whole_lines(path: Path) -> bytes:
    """What a file holds, without an incomplete last line."""
    content = _content(path)
    return content[: content.rfind(b"\n") + 1]


def run_of(record: Mapping[str, Any]) -> Run:
    cell = Cell(record["setup"], record["label"], record["rank"])
    return Run(cell, record["learning_rate"], record["seed"], record["part"])


def gave_up(metrics: Sequence[Mapping[str, Any]], max_skipped_steps: int) -> bool:
    """Whether a run has ended since loss or gradients were not finite in too many steps in a row.

    Args:
        metrics: the lines of metrics.jsonl.
        max_skipped_steps: the option of this name.
    """
    last = [line for line in metrics if "loss" in line][-max_skipped_steps:]
    return len(last) == max_skipped_steps and all("skipped_step" in line for line in last)


def ends_finite(metrics: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the losses of a run's last step and last evaluation are finite.

    Args:
        metrics: the lines of metrics.jsonl; null is a number that is not finite.
    """
    last = ([line[key] for line in metrics if key in line][-1:] for key in ("loss", "eval_loss"))
    return all(losses != [None] for losses in last)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. Empty if the run took no step."""
    lines = [json.loads(line) for line in _whole_lines(folder / "metrics.jsonl").splitlines()]
    return lines if any("loss" in line for line in lines) else []


def make_record(
    run: Run,
    options: dict[str, Any],
    folder: Path,
    *,
    has_diverged: bool,
    seconds: float,
    device: str,
) -> dict[str, Any]:
    """What runs.jsonl keeps of a finished run.

    Args:
        options: the options that were given to ``scalora train``, but for data and ``output_dir``.
        folder: the run's ``output_dir``.
        has_diverged: whether it diverged. Then ``summary.json`` may be missing.
        seconds: of the process that finished the run, start-up included.
        device: name of the device.
    """
    metrics = read_metrics(folder)
    losses = [line["loss"] for line in metrics if "loss" in line]
    evaluations = [
        {name: line[name] for name in ("step", "eval_loss", "eval_exact_match")}
        for line in metrics
        if "eval_loss" in line
    ]
    summary = json.loads(_content(folder / "summary.json") or b"{}")
    after = {
        name: summary[name][-1] if summary.get(name) else None
        for name in ("eval_loss", "eval_exact_match")
    }
    named = (
        *("world_size", "trained_parameters", "update_rank", "layers_by_rule"),
        *("seconds_per_step", "peak_memory_bytes"),
    )
    cell = run.cell
    return {
        "setup": cell.setup,
        "label": cell.label,
        "rank": cell.rank,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "part": run.part,
        "options": options,
        "method_options": method_options(options),
        "diverged": has_diverged,
        "steps": len(losses),
        "losses": condense(losses),
        "evaluations": evaluations,
        **after,
        **{name: summary.get(name) for name in named},
        "seconds": seconds,
        "versions": installed_versions(*LIBRARIES),
        "device": device,
    }


def condense(losses: Sequence[float | None]) -> list[float | None]:
    """At most ``MOST_POINTS`` losses: each is the mean of its steps; None if one is not finite."""
    values = np.array([math.nan if loss is None else loss for loss in losses], dtype=float)
    parts = np.array_split(values, min(MOST_POINTS, max(len(values), 1)))
    means = [float(f"{part.mean():.{DIGITS}g}") if len(part) else math.nan for part in parts]
    return [mean if math.isfinite(mean) else None for mean in means]


def point_steps(steps: int, points: int) -> list[int]:
    """The last step of each point of `condense`, counted from 1."""
    return np.cumsum([len(part) for part in np.array_split(np.arange(steps), points)]).tolist()


def prepare(folder: Path, options: dict[str, Any]) -> None:
    """Make a run's folder, and delete what an unfinished run with other options has left there.

    A resume would go on from its checkpoint.

    Args:
        folder: the run's folder.
        options: as for `make_record`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(options, sort_keys=True)
    if _content(folder / OPTIONS).decode() != text:
        shutil.rmtree(folder / OUTPUT, ignore_errors=True)
        (folder / OPTIONS).write_text(text)


def tidy(folder: Path) -> None:
    """Delete what a finished run wrote, but for ``KEPT`` and its log. May be repeated.

    Args:
        folder: the run's folder.
    """
    output = folder / OUTPUT
    for name in KEPT:
        if (output / name).exists():
            (output / name).replace(folder / name)
    shutil.rmtree(output, ignore_errors=True)
    (folder / OPTIONS).unlink(missing_ok=True)
