"""Writes and reads checkpoints on all ranks, with torch.distributed.checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.planner import SavePlanner as Planner
from torch.distributed.checkpoint.storage import WriteResult

from scalora_dist.checkpoint.manifest import (
    STATE,
    FileRecord,
    checkpoint_folder,
    checkpoints,
    faults,
    prune,
    publish,
    read_manifest,
    write_synced,
)
from scalora_dist.checkpoint.parts import FlatPart, LoadPlanner, SavePlanner, Stager
from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError
from scalora_dist.model_io.safetensors_writer import SafetensorsWriter

T = TypeVar("T")
NFS_SECONDS = 10.0  # time until a node surely sees a file that another node has made


class Checkpoints:
    """The checkpoints of one run, in ``output_dir``, which all ranks must share.

    A thread writes them while the run trains. It has its own process group, so that its collectives
    cannot be mixed up with those of training.

    Attributes:
        output_dir: the run's folder.
        world: the ranks.
        keep: number of checkpoints to keep.
        group: the process group of the collectives here.
        shared: whether all nodes see the same ``output_dir``, as far as ``unshared`` has found.
    """

    def __init__(self, output_dir: Path, world: World, *, keep: int, timeout: timedelta) -> None:
        """
        Args:
            keep: number of checkpoints to keep. Older ones are deleted when a new one is complete.
            timeout: the time-out of the collectives.
        """
        self.output_dir = output_dir
        self.world = world
        self.keep = keep
        self.group = dist.new_group(backend="gloo", timeout=timeout, group_desc="checkpoints")
        self.shared = True
        self._writing: Future[Any] | None = None
        self._target = output_dir

    def save(self, step: int, parts: Mapping[str, FlatPart], state: dict[str, Any]) -> None:
        """Begin to write ``checkpoint-<step>``. Returns when ``parts`` may change again.

        Called on every rank. ``outcome(wait=True)`` must have been called after the last save.

        Args:
            step: number of steps so far.
            parts: {name: the part that this rank saves}. All ranks' parts cover the full tensors.
            state: the contents of state.json. Only rank 0's are written.
        """
        self._target = checkpoint_folder(self.output_dir, step)
        self._writing = cast(
            "Future[Any]",
            dcp.async_save(
                dict(parts),
                storage_writer=_Writer(self._target, self.keep, state),
                planner=SavePlanner(),
                process_group=self.group,
                async_stager=Stager(),
            ),
        )

    def outcome(self, *, wait: bool) -> str | None:
        """Why the last save failed, returned only once. None: it succeeded, or is still running."""
        if self._writing is None or not (wait or self._writing.done()):
            return None
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except CheckpointException as error:  # raised on all ranks
            reasons = {f"rank {rank}: {reason}" for rank, (reason, _) in error.failures.items()}
            if self.world.is_main:
                shutil.rmtree(_partial(self._target), ignore_errors=True)
            return f"{self._target.name} could not be written ({'; '.join(sorted(reasons))})"
        return None

    def load(
        self, folder: Path, parts: Mapping[str, FlatPart]
    ) -> tuple[Sequence[str], Sequence[str]]:
        """Fill ``parts`` from a sound checkpoint, which may be sharded otherwise. A collective.

        Returns:
            the names of parts that the checkpoint does not hold, and of its tensors that are not
            among the parts.
        """
        planner = LoadPlanner()
        dcp.load(
            dict(parts),
            storage_reader=HuggingFaceStorageReader(str(folder)),
            planner=planner,
            process_group=self.group,
        )
        return planner.missing, planner.unread

    def faults(self, folder: Path) -> list[str]:
        """What is wrong with a checkpoint, on every rank. Each rank checks some of the files.

        A collective.
        """
        files = self.from_rank_0(lambda: read_manifest(folder))
        if isinstance(files, str):
            return [files]
        mine = faults(folder, files, list(files)[self.world.rank :: self.world.size])
        everyone: list[list[str]] = [[]] * self.world.size
        dist.all_gather_object(everyone, mine, group=self.group)
        return [fault for some in everyone for fault in some]

    def unshared(self) -> int:
        """The number of nodes whose ``output_dir`` is not the folder that rank 0 sees.

        A collective. With several nodes, it creates ``output_dir``.

        Raises:
            UserError: rank 0 cannot write there.
        """
        if self.world.nodes == 1:
            return 0
        probe = self.output_dir / ".shared"

        def write() -> None:
            try:
                self.output_dir.mkdir(parents=True, exist_ok=True)
                probe.touch()
            except OSError as error:
                raise UserError(f"--output_dir {self.output_dir}: {error.strerror}") from error

        self.world.main_only(write)
        deadline = time.monotonic() + NFS_SECONDS
        while not (seen := probe.exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
        (missing,) = self.world.sum(self.world.local_rank == 0 and not seen)
        if self.world.is_main:
            probe.unlink(missing_ok=True)
        self.shared = not missing
        return round(missing)

    def close(self) -> None:
        """Wait for the last save, then leave the process group, which ends its threads."""
        self.outcome(wait=True)
        dist.destroy_process_group(self.group)

    def newest_first(self) -> list[Path]:
        """The run's checkpoints as rank 0 sees them, on every rank: one broadcast."""
        return self.from_rank_0(lambda: checkpoints(self.output_dir))

    def from_rank_0(self, read: Callable[[], T]) -> T:
        """What ``read`` returns on rank 0, on every rank: one broadcast.

        Args:
            read: called on rank 0 only. Its result must be picklable.
        """
        found = [read() if self.world.is_main else None]
        dist.broadcast_object_list(found, src=0, group=self.group)
        return cast(T, found[0])


@dataclass(frozen=True)
class _Written:
    """A file that one rank has written.

    Attributes:
        name: the name of the file in the folder.
        bytes: size of the file in bytes.
        sha256: checksum of the file in hexadecimal.
    """

    name: str
    bytes: int
    sha256: str

    def record(self) -> FileRecord:
        return {"bytes": self.bytes, "sha256": self.sha256}


class _Writer(StorageWriter):
    """Writes one safetensors file per rank, then state.json and the manifest, then renames."""

    def __init__(self, folder: Path, keep: int, state: dict[str, Any]) -> None:
        self.folder = folder
        self.keep = keep
        self.state = state

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to do: each writer is made for one folder."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do before the plan."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Called on rank 0 only, when all ranks have their plan and none has begun to write."""
        shutil.rmtree(_partial(self.folder), ignore_errors=True)
        _partial(self.folder).mkdir(parents=True)
        return plans

    def write_data(
        self, plan: SavePlan, planner: Planner
    ) -> torch.futures.Future[list[WriteResult]]:
        name = f"rank-{dist.get_rank():05d}.safetensors"
        entries, offsets = {}, {}
        for item in plan.items:
            data = item.tensor_data
            assert data is not None
            entries[item.index.fqn] = (data.chunk.sizes, data.properties.dtype)
            offsets[item.index.fqn] = {SAVED_OFFSETS_KEY: list(data.chunk.offsets)}
        with open(_partial(self.folder) / name, "wb") as file:
            hashed = _Hashed(file)
            writer = SafetensorsWriter(
                cast(BinaryIO, hashed), entries, {CUSTOM_METADATA_KEY: json.dumps(offsets)}
            )
            for item in plan.items:
                writer.write(cast(torch.Tensor, planner.resolve_data(item)))
            file.flush()
            os.fsync(file.fileno())
        written = _Written(name, hashed.bytes, hashed.digest.hexdigest())
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([WriteResult(item.index, hashed.bytes, written) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on rank 0 only, when every rank has written its file."""
        partial = _partial(self.folder)
        written = {item.storage_data for rank in results for item in rank}
        files = {file.name: file.record() for file in sorted(written, key=lambda file: file.name)}
        files[STATE] = write_synced(partial / STATE, json.dumps(self.state, indent=2).encode())
        publish(partial, self.folder, files)
        prune(self.folder.parent, self.keep, newest=self.folder)

    def storage_meta(self) -> StorageMeta | None:
        return None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


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


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")
