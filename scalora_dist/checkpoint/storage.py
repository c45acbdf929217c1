"""The checkpoints of a run: begins to write them, finds sound ones, and loads them on all ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from scalora_dist.checkpoint.index import Index, open_index
from scalora_dist.checkpoint.manifest import (
    checkpoint_folder,
    checkpoints,
    faults,
    read_manifest,
)
from scalora_dist.checkpoint.parts import FlatPart, stage
from scalora_dist.checkpoint.tensors import fill
from scalora_dist.checkpoint.writer import Save, Writer
from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError

NFS_SECONDS = 10.0  # time until a node surely sees a file that another node has made


class Checkpoints:
    """The checkpoints of one run, in ``output_dir``, which all ranks must share.

    A thread writes them while the run trains. It talks to the other ranks over the store, so that
    nothing can be mixed up with the collectives of training.

    Attributes:
        output_dir: the run's folder.
        world: the ranks.
        shared: whether all nodes see the same ``output_dir``, as far as ``unshared`` has found.
    """

    def __init__(self, output_dir: Path, world: World, *, keep: int, timeout: timedelta) -> None:
        """
        Args:
            keep: number of checkpoints to keep. Older ones are deleted when a new one is complete.
            timeout: time that a rank's save waits for the other ranks.
        """
        self.output_dir = output_dir
        self.world = world
        self.shared = True
        self._writer = Writer(world, keep=keep, timeout=timeout)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: Future[str | None] | None = None
        self._target = output_dir

    def save(
        self,
        step: int,
        parts: Mapping[str, FlatPart],
        own: Mapping[str, FlatPart],
        state: dict[str, Any],
    ) -> None:
        """Begin to write ``checkpoint-<step>``. Returns when the tensors may change again.

        Called on every rank. ``outcome(wait=True)`` must have been called after the last save.

        Args:
            step: number of steps so far.
            parts: {name: the part that this rank saves}, with the same names on all ranks. All
                ranks' parts cover each tensor once.
            own: {name: full tensor} of tensors that this rank alone knows.
            state: the contents of state.json. Only rank 0's are written.
        """
        self._target = checkpoint_folder(self.output_dir, step)
        save = Save(self._target, stage(parts), stage(own), state)
        self._writing = self._thread.submit(self._writer.write, save)

    def outcome(self, *, wait: bool) -> str | None:
        """Why the last save failed, returned only once. None: it succeeded, or is still running."""
        if self._writing is None or not (wait or self._writing.done()):
            return None
        writing, self._writing = self._writing, None
        if failure := writing.result():
            return f"{self._target.name} could not be written ({failure})"
        return None

    def load(
        self, folder: Path, parts: Mapping[str, FlatPart]
    ) -> tuple[Sequence[str], Sequence[str]]:
        """Fill ``parts`` from a sound checkpoint, which may be sharded otherwise. A collective.

        A rank opens only the files that hold something of its parts.

        Returns:
            the names of parts that the checkpoint does not hold, and of its tensors that are not
            among the parts.

        Raises:
            UserError: on every rank, if its index cannot be read or a tensor has another size.
        """
        read = self.world.json_from_rank_0(lambda: open_index(folder).encode().decode())
        index = Index.decode(read)
        fill(folder, index, {name: part for name, part in parts.items() if name in index.tensors})
        return (
            [name for name in parts if name not in index.tensors],
            [name for name in index.tensors if name not in parts],
        )

    def faults(self, folder: Path) -> list[str]:
        """What is wrong with a checkpoint, on every rank. Each rank checks some of the files.

        A collective.
        """
        files = self.world.json_from_rank_0(lambda: read_manifest(folder))
        if isinstance(files, str):
            return [files]
        mine = faults(folder, files, list(files)[self.world.rank :: self.world.size])
        if self.world.sum(len(mine)) == [0.0]:
            return []
        return [
            fault for some in self.world.exchange(json.dumps(mine)) for fault in json.loads(some)
        ]

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
        """Wait for the last save, and end the thread."""
        self.outcome(wait=True)
        self._thread.shutdown()

    def newest_first(self) -> list[Path]:
        """The run's checkpoints as rank 0 sees them, on every rank."""
        found = self.world.json_from_rank_0(
            lambda: [path.name for path in checkpoints(self.output_dir)]
        )
        return [self.output_dir / name for name in found]
