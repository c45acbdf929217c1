"""Converts a data set in parts, which all cores of the machine share."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features
from datasets.utils import tqdm

from scalora_dist.distributed.cores import cores
from scalora_dist.distributed.worker_signals import ENDINGS, outlive_signals
from scalora_dist.errors import RunExit, UserError

SHARD_BYTES = 4 << 20  # of raw examples of a shard: a process needs seconds for it
MOST_SHARDS = 4096  # each is a file


@dataclass(frozen=True)
class Shards:
    """A data set that is converted shard by shard, each into a file of its own.

    The shards depend on the data alone. So the files are the same for any number of processes, and
    a call that was killed goes on where it was.

    Attributes:
        dataset: the raw examples.
        convert: given a batch, the index of each row in its shard, and ``offset``, the index of the
            shard's first row in ``dataset``, returns columns of ``features``.
        features: columns of the result.
        folder: folder of the files.
        fingerprint: names the result. It depends on all of the above.
    """

    dataset: Dataset
    convert: Callable[..., dict[str, list[Any]]]
    features: Features
    folder: Path
    fingerprint: str

    @cached_property
    def count(self) -> int:
        """Number of shards: 1 for small data, which would not be worth the start of a process."""
        shards = self.dataset.data.nbytes // SHARD_BYTES
        return max(1, min(shards, MOST_SHARDS, len(self.dataset)))

    def file(self, number: int) -> Path:
        """Path of a shard's file. It exists only if it is whole."""
        part = f"-{number:04d}-of-{self.count:04d}" if self.count > 1 else ""
        return self.folder / f"tokens-{self.fingerprint}{part}.arrow"

    def write(self, number: int) -> int:
        """Convert a shard. Returns the number of its rows."""
        size = len(self.dataset)
        begin, end = (size * i // self.count for i in (number, number + 1))
        self.dataset.select(range(begin, end)).map(
            self.convert,
            with_indices=True,
            batched=True,
            fn_kwargs={"offset": begin},
            remove_columns=self.dataset.column_names,
            features=self.features,
            cache_file_name=str(self.file(number)),
            load_from_cache_file=True,
            new_fingerprint=f"{self.fingerprint}-{number}",
            desc="Tokenizing",
        )
        return end - begin

    def write_all(self) -> list[str]:
        """Convert the shards that have no file yet, and return the paths of all files.

        Raises:
            UserError: what ``convert`` raises in the first shard that fails, or a process was
                killed.
        """
        numbers = range(self.count)
        missing = [number for number in numbers if not self.file(number).exists()]
        if self.count == 1:
            self.write(0)  # with its own progress bar
        elif missing:
            processes = min(cores(), len(missing))
            if multiprocessing.current_process().daemon:  # it may start no processes
                processes = 1
            size, alone = len(self.dataset), map(self.write, missing)
            with tqdm(total=size, unit=" examples", desc="Tokenizing") as bar, _silent():
                bar.update(size * (self.count - len(missing)) // self.count)
                for rows in self._in_processes(missing, processes) if processes > 1 else alone:
                    bar.update(rows)
        return [str(self.file(number)) for number in numbers]

    def _in_processes(self, missing: list[int], processes: int) -> Iterator[int]:
        """``write`` each shard in one of several forks of this process."""
        executor = ProcessPoolExecutor(
            processes,
            # Forks share this process's data, and start at once. They never touch a GPU.
            multiprocessing.get_context("fork"),
            initializer=_begin,
            initargs=(os.getpid(), self.write),
        )
        try:
            # A stop signal that reached a fork before `_begin` would seem to reach this process.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
            try:
                written = [executor.submit(_write, number) for number in missing]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for each in written:
                yield each.result()
        except BrokenProcessPool as error:
            raise UserError(
                "A process that tokenizes the data was killed, perhaps for lack of memory: free "
                "some, and start the run again."
            ) from error
        except BaseException:
            for process in list(executor._processes.values()):  # they may have long to go
                process.terminate()
            raise
        finally:
            executor.shutdown(cancel_futures=True)


@contextmanager
def _silent() -> Iterator[None]:
    """Hide the progress bars of the shards, inside that of all of them."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


_job: Callable[[int], int]  # of this process, if it is a fork


def _begin(run: int, job: Callable[[int], int]) -> None:
    """Prepare a fork of the process ``run``. A fork inherits ``job``: nothing is pickled."""
    global _job
    outlive_signals(run)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of a fork's parent are not in it
    _job = job


def _write(number: int) -> int:
    try:
        return _job(number)
    except (RunExit, UnicodeDecodeError, OSError):
        raise
    except Exception as error:  # of a tokenizer, for example; it may not survive pickling
        raise RuntimeError("".join(traceback.format_exception(error))) from None
