"""Writes a checkpoint on all ranks at once: each rank one file, rank 0 the small files.

The ranks exchange a few short texts over the store, and no collective is called. What they tell
each other of names and cuts is sent again only after it has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch.distributed as dist

from scalora_dist.checkpoint.cuts import Cuts, facts, index_of
from scalora_dist.checkpoint.index import OFFSETS, SHARDING, rank_file
from scalora_dist.checkpoint.manifest import (
    INDEX,
    STATE,
    FileRecord,
    prune,
    publish,
    write_synced,
)
from scalora_dist.checkpoint.parts import FlatPart
from scalora_dist.distributed.world import World
from scalora_dist.model_io.safetensors_writer import SafetensorsWriter

NAMED = 8  # number of ranks whose failures a message names
FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.5  # seconds between two questions to the store
AT_EXIT = 60.0  # seconds that a process which ends waits for the other ranks' parts


@dataclass(frozen=True)
class Save:
    """What one rank needs to write a checkpoint.

    Attributes:
        folder: the checkpoint's folder, the same on all ranks.
        shared: {name: this rank's part} of the tensors that all ranks know.
        own: {name: tensor} of those that this rank alone knows.
        state: the contents of state.json; only rank 0's are written.
    """

    folder: Path
    shared: Mapping[str, FlatPart]
    own: Mapping[str, FlatPart]
    state: dict[str, Any]

    @property
    def partial(self) -> Path:
        """The folder that the ranks write into, until all is there."""
        return self.folder.with_name(f"{self.folder.name}.partial")


class Writer:
    """Writes one checkpoint after another. Not for two threads of a rank at once.

    Attributes:
        world: the ranks.
        keep: number of checkpoints to keep.
        timeout: how long a rank waits for the others.
    """

    def __init__(self, world: World, *, keep: int, timeout: timedelta) -> None:
        self.world = world
        self.keep = keep
        self.timeout = timeout
        # Over the main thread's connection: each costs the store's process a look into the DNS. So
        # this thread never waits for a key, which would block it. Nor should the main thread while
        # a save runs, as in ``World.main_only`` with long work: it would block the save.
        self._store = dist.PrefixStore(f"save/{world.new_name()}", world.store)
        self._records = [f"record/{rank}" for rank in range(world.size)]
        self._saves = 0
        self._oldest = 1  # the first save whose keys are still in the store
        self._sent = ""  # this rank's cuts, as rank 0 knows them
        self._known = [""] * world.size  # on rank 0, all ranks' cuts
        self._index = b""  # on rank 0, the index.json that follows from them

    def write(self, save: Save) -> str | None:
        """Write a checkpoint. A collective.

        Returns:
            why it could not be written, the same on all ranks; None: it is there.

        Raises:
            DistStoreError: the other ranks did not come within ``timeout``.
        """
        self._saves += 1
        failure = self._on_rank_0("begun", lambda: _make(save.partial))
        if not failure:
            self._report(save)
            failure = self._on_rank_0("done", lambda: self._publish(save))
            self._forget()
        if failure:
            self._sent, self._index = "", b""  # rank 0 may not have taken what was sent
            if self.world.is_main:
                shutil.rmtree(save.partial, ignore_errors=True)
        return failure or None

    def _on_rank_0(self, moment: str, work: Callable[[], object]) -> str:
        """Do ``work`` on rank 0. Returns, on all ranks, why it failed; empty if it did not."""
        key = f"{self._saves}/{moment}"
        if self.world.is_main:
            failure = _failure(work, "rank 0")
            self._store.set(key, json.dumps(failure))
            return failure
        self._wait_for(key)
        return str(json.loads(self._store.get(key)))

    def _wait_for(self, key: str) -> None:
        """Wait for a key by asking for it, more and more seldom: the main thread may go on.

        Raises:
            DistStoreError: it does not come within ``timeout``.
        """
        patience, pause = self.timeout.total_seconds(), FIRST_PAUSE
        begun = time.monotonic()
        while not self._store.check([key]):
            waited = time.monotonic() - begun
            if not threading.main_thread().is_alive():  # the process ends, and waits for this
                patience = min(patience, waited + AT_EXIT)
            if waited > patience:
                raise dist.DistStoreError(f"other ranks did not do their part in {waited:.0f} s")
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)

    def _report(self, save: Save) -> None:
        """Write this rank's file, and tell rank 0 its size and checksum, or why it failed."""
        rank = self.world.rank
        record: dict[str, Any] = {}

        def work() -> None:
            cuts = Cuts.of(save.shared, save.own).encode()
            if cuts != self._sent:
                record["cuts"] = self._sent = cuts
            record.update(_write_file(save, rank))

        record["failure"] = _failure(work, f"rank {rank}")
        self._store.set(self._records[rank], json.dumps(record))
        if self._store.add(f"{self._saves}/written", 1) == self.world.size:
            self._store.set(f"{self._saves}/all", "")

    def _publish(self, save: Save) -> None:
        """Make the checkpoint of the files that all ranks have written. Rank 0 only."""
        self._wait_for(f"{self._saves}/all")
        records = [json.loads(text) for text in self._store.multi_get(self._records)]
        for rank, record in enumerate(records):
            if cuts := record.get("cuts"):
                self._known[rank], self._index = cuts, b""
        if failures := [record["failure"] for record in records if record["failure"]]:
            more = f"; {len(failures) - NAMED} more ranks" if len(failures) > NAMED else ""
            raise _Failed("; ".join(failures[:NAMED]) + more)
        if not self._index:
            ranks = [Cuts.decode(text) for text in self._known]
            self._index = index_of(facts(save.shared), ranks).encode()
        files: dict[str, FileRecord] = {
            rank_file(save.folder, rank).name: {"bytes": x["bytes"], "sha256": x["sha256"]}
            for rank, x in enumerate(records)
        }
        files[INDEX] = write_synced(save.partial / INDEX, self._index)
        files[STATE] = write_synced(save.partial / STATE, json.dumps(save.state, indent=2).encode())
        publish(save.partial, save.folder, files)
        prune(save.folder.parent, self.keep, newest=save.folder)

    def _forget(self) -> None:
        """Delete the keys of earlier saves, which all ranks have ended: they wrote in this one."""
        while self.world.is_main and self._oldest < self._saves:
            for key in ("begun", "written", "all", "done"):
                self._store.delete_key(f"{self._oldest}/{key}")
            self._oldest += 1


class _Failed(Exception):
    """Says which ranks could not write their files, and why."""


def _failure(work: Callable[[], object], who: str) -> str:
    """Why ``work`` raised on the rank ``who``; empty if it did not."""
    try:
        work()
    except _Failed as error:
        return str(error)
    except dist.DistError:  # the job is about to end
        raise
    except OSError as error:
        return f"{who}: {error.strerror or error}"
    except Exception as error:  # whatever it is, the other ranks wait for this one
        return f"{who}: {type(error).__name__}: {error}"
    return ""


def _make(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_file(save: Save, rank: int) -> FileRecord:
    """Write this rank's safetensors file, with each tensor's offset in its header."""
    parts = {x: part for x, part in {**save.shared, **save.own}.items() if part.local.numel()}
    entries = {name: (part.local.shape, part.local.dtype) for name, part in parts.items()}
    offsets = {name: {OFFSETS: [part.offset]} for name, part in parts.items()}
    with open(rank_file(save.partial, rank), "wb") as file:
        hashed = _Hashed(file)
        writer = SafetensorsWriter(cast(BinaryIO, hashed), entries, {SHARDING: json.dumps(offsets)})
        for part in parts.values():
            writer.write(part.local)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashed.bytes, "sha256": hashed.digest.hexdigest()}


class _Hashed:
    """A file that counts the bytes written and computes their SHA-256 checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.bytes += memoryview(data).nbytes
