"""Logs a run while it trains: metrics.jsonl, TensorBoard events, a progress bar."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from scalora_dist.errors import UserError

logger = logging.getLogger(__name__)


class RunLog:
    """Writes the log on rank 0. On other ranks it does nothing, so callers need not check the rank.

    A full disk does not end the run. Lines of metrics.jsonl wait in memory until there is space.
    TensorBoard events stop.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_main: bool,
        first_step: int,
        steps: int,
        logging_steps: int,
        history: Sequence[dict[str, Any]] = (),
    ) -> None:
        """
        Args:
            folder: the run's ``output_dir``.
            is_main: whether this is rank 0.
            first_step: number of steps before this process started.
            steps: number of steps of the whole run.
            logging_steps: steps between two points in TensorBoard.
            history: the lines with which metrics.jsonl begins.

        Raises:
            UserError: on rank 0, where metrics.jsonl cannot be written.
        """
        self.is_main = is_main
        self.folder = folder
        self.logging_steps = logging_steps
        self.bar = tqdm(
            total=steps, initial=first_step, unit="step", desc="training", disable=not is_main
        )
        if is_main:
            file = folder / "metrics.jsonl"
            with disk_errors_told(file):
                folder.mkdir(parents=True, exist_ok=True)
                aside = folder / "metrics.jsonl.partial"
                lines = (json.dumps(_without_nan(record)) + "\n" for record in history)
                aside.write_text("".join(lines))
                aside.replace(file)
                self.lines = _Lines(file)
            # TensorBoard discards the events that an earlier run logged after its checkpoint.
            purge = first_step + 1 if history else None
            self.board: SummaryWriter | None = None
            try:
                self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
            except OSError as error:
                logger.warning("no TensorBoard events: %s", error)

    def step(self, record: dict[str, Any]) -> None:
        """Log one optimizer step: a line, the bar, and every ``logging_steps`` the scalars."""
        if not self.is_main:
            return
        self._line(record)
        speed = f"{record['tokens'] / record['seconds']:.0f}"
        self.bar.set_postfix({"loss": f"{record['loss']:.4f}", "tokens/s": speed})
        self.bar.update()
        if record["step"] % self.logging_steps == 0:
            self._scalars("train", record)

    def note(self, step: int, prefix: str, record: dict[str, Any]) -> None:
        """Log what is not one optimizer step: a line, and scalars under ``prefix``."""
        if self.is_main:
            self._line({"step": step, **record})
            self._scalars(prefix, {"step": step, **record})

    def evaluation(self, step: int, record: dict[str, Any]) -> None:
        if not self.is_main:
            return
        self.note(step, "eval", record)
        self.bar.write(
            f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in record.items())
        )

    def sync(self) -> None:
        """Flush the log to disk, before a checkpoint that relies on it is written.

        A run resumed from that checkpoint keeps the lines before it, and writes those after it.
        """
        if self.is_main:
            self.lines.sync()
            self._draw(SummaryWriter.flush)

    def close(self) -> None:
        self.bar.close()
        if self.is_main:
            self.lines.close()
            self._draw(SummaryWriter.close)

    def _line(self, record: dict[str, Any]) -> None:
        self.lines.write(json.dumps(_without_nan(record)) + "\n")

    def _scalars(self, prefix: str, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, dict):
                self._scalars(f"{prefix}/{name}", {"step": record["step"], **value})
            elif name != "step":
                tag, step = f"{prefix}/{name}", record["step"]
                self._draw(
                    partial(SummaryWriter.add_scalar, tag=tag, scalar_value=value, global_step=step)
                )

    def _draw(self, what: Callable[[SummaryWriter], None]) -> None:
        if self.board is None:
            return
        try:
            what(self.board)
        except OSError as error:  # raised by the writer's thread, which has ended
            logger.warning("no more TensorBoard events: %s", error)
            self.board = None


class _Lines:
    """Appends lines to a file. Bytes that a full disk did not take are kept and tried again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.late = b""
        self.warned = False
        # Unbuffered, so that ``write`` returns how many bytes of a line are in the file.
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, text: str) -> None:
        self.late += text.encode()
        try:
            while self.late:
                self.late = self.late[self.file.write(self.late) :]
        except OSError as error:
            if not self.warned:
                logger.warning("%s: %s; its lines wait for space", self.path, error.strerror)
            self.warned = True

    def sync(self) -> None:
        self.write("")
        with suppress(OSError):  # full disk, on file systems that allocate late
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.write("")
        if self.late:
            logger.warning("%s lacks its last %d bytes", self.path, len(self.late))
        self.file.close()


def read_history(folder: Path, step: int) -> list[dict[str, Any]]:
    """The lines of ``folder``'s metrics.jsonl up to ``step``, without an incomplete last line.

    Warns of lines that are lost or damaged. No decision of a resumed run needs them.
    """
    try:
        text = (folder / "metrics.jsonl").read_text(errors="replace")
    except OSError:
        text = ""
    records = [_record(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    history = [record for record in records if record and record["step"] <= step]
    lost = step - len({record["step"] for record in history if "loss" in record})
    if lost or None in records:
        logger.warning(
            "%s lacks the lines of %d step(s) or is damaged: going on without them",
            folder / "metrics.jsonl",
            lost,
        )
    return history


def _record(line: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl, with NaN for null. None if the line is damaged."""
    try:
        record = json.loads(line)
        step, loss = record["step"], record.get("loss", 0.0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(step, int) or not isinstance(loss, float | None):
        return None
    return {name: math.nan if value is None else value for name, value in record.items()}


@contextmanager
def disk_errors_told(path: Path) -> Iterator[None]:
    """Turn an error of the disk into a sentence that names ``path``.

    Raises:
        UserError: inside ``with`` there was an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror or error}): correct this (free some "
            "space, for example), then go on with --resume_from_checkpoint latest"
        ) from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file, which is never partial. None takes the place of NaN."""
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(json.dumps(_without_nan(value), indent=2) + "\n")
    aside.replace(path)


def _without_nan(value: Any) -> Any:
    """``value`` with None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
