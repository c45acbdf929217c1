"""Measures what the bookkeeping of a checkpoint costs rank 0 at any number of ranks.

    python tools/time_checkpoint_host.py [--ranks 1024]

Rank 0 is real, with a real TCP store: what its thread does in a save, and what it does to load. A
thread plays the other ranks. It sends the records that they would send, and makes their files,
which are empty. The tensors are those of a ScaLoRA run on Gemma-3-12B's 336 projections in 16 bits.
Their matrices have 1/16 of the rows and columns, since the tensors' bytes are not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from scalora_dist.checkpoint.cuts import Cuts, checksum, facts
from scalora_dist.checkpoint.index import Index, rank_file
from scalora_dist.checkpoint.manifest import INDEX
from scalora_dist.checkpoint.parts import FlatPart
from scalora_dist.checkpoint.tensors import fill
from scalora_dist.checkpoint.writer import Save, Writer
from scalora_dist.distributed.world import World
from scalora_dist.planning.ranges import SHARDINGS, Sharding, ranges_of
from tools.gpu.gemma import projection_shapes, text_config

SMALLER, R = 16, 8
GENERATORS = ("cpu", "cuda", "numpy", "python")


def run_tensors(blocks: int | None = None) -> dict[str, tuple[torch.dtype, int, int]]:
    """{name: (dtype, rows, columns)} of what a run saves, in the order of the names.

    Args:
        blocks: number of decoder blocks; None: all 48.
    """
    config = text_config(smoke=False, blocks=blocks)
    found: dict[str, tuple[torch.dtype, int, int]] = {}
    for layer, (m, n) in projection_shapes(config).items():
        m, n = m // SMALLER, n // SMALLER
        for block in range(config.num_hidden_layers):
            name = f"model.layers.{block}.{layer}"
            found[f"{name}.weight"] = torch.bfloat16, m, n
            found[f"{name}.weight.low"] = torch.int16, m, n
            for end in ("", ".m", ".v"):
                found[f"{name}.A{end}"] = torch.float32, m, R
                found[f"{name}.B{end}"] = torch.float32, n, R
    return dict(sorted(found.items()))


def cuts_of(
    tensors: dict[str, tuple[torch.dtype, int, int]], sharding: Sharding, size: int
) -> NDArray[np.int64]:
    """(ranks, tensors, 2): the first element and the number of elements that a rank saves."""
    trained = [dtype == torch.float32 for dtype, _, _ in tensors.values()]
    shapes = [(rows, cols) for _, rows, cols in tensors.values()]
    found = np.zeros((size, len(tensors), 2), dtype=np.int64)
    for kind in (True, False):
        which = [i for i, each in enumerate(trained) if each == kind]
        # Under ZeRO-1 all ranks hold W, and each saves a slice: as under ZeRO-3.
        rule: Sharding = "zero3" if sharding == "zero1" and not kind else sharding
        low, high = ranges_of(rule, [shapes[i] for i in which], size).unbind(-1)
        found[:, which] = torch.stack([low, high - low], dim=-1).numpy()
    return found


class Counted:
    """A store that counts its calls and the bytes of their keys and values."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            answer = getattr(self.store, name)(*args)
            self.calls[name] += 1
            self.bytes += len(repr((args, answer)))
            return answer

        return call


class SimulatedRanks:
    """Rank 0 with its writer and its tensors, and a thread for each save that plays the others.

    Attributes:
        parts: rank 0's parts.
        store: rank 0's connection to the store.
    """

    def __init__(self, size: int, sharding: Sharding, blocks: int | None = None) -> None:
        self.size = size
        self._server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        world = World(0, size, 0, torch.device("cpu"), self._server, nodes=-(-size // 8))
        self.writer = Writer(world, keep=1, timeout=timedelta(seconds=600))
        self.store = Counted(self.writer._store)
        self.writer._store = self.store  # type: ignore[assignment]
        tensors = run_tensors(blocks)
        cuts = cuts_of(tensors, sharding, size)
        held = zip(tensors.items(), cuts[0].tolist(), strict=True)
        self.parts = {
            name: FlatPart(torch.zeros(count, dtype=dtype), first, m * n)
            for (name, (dtype, m, n)), (first, count) in held
        }
        known = checksum(facts(self.parts))
        self.cuts = [
            Cuts(known, cuts[rank], facts(self._own(rank))).encode() for rank in range(size)
        ]

    def save(self, folder: Path, number: int, *, count: bool = False) -> dict[str, float]:
        """Write the ``number``-th checkpoint.

        Args:
            count: whether to count the Python functions that rank 0 calls, which takes time.

        Returns:
            the CPU seconds of rank 0's thread, its Python calls, and its messages and bytes.
        """
        others = threading.Thread(target=self._play, args=(folder, number))
        others.start()
        self.store.calls.clear()
        self.store.bytes = calls = 0

        def note(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event == "call"

        save = Save(folder, self.parts, self._own(0), {})
        started = time.thread_time()
        sys.setprofile(note if count else None)
        try:
            failure = self.writer.write(save)
        finally:
            sys.setprofile(None)
        seconds = time.thread_time() - started
        others.join()
        if failure:
            raise RuntimeError(failure)
        messages = self.store.calls.total() - self.store.calls["check"]  # those of the wait
        return {
            "seconds": seconds,
            "python": calls,
            "messages": messages,
            "bytes": self.store.bytes,
        }

    def _own(self, rank: int) -> dict[str, FlatPart]:
        return {f"random.{rank}.{x}": FlatPart(torch.zeros(16), 0, 16) for x in GENERATORS}

    def _play(self, folder: Path, number: int) -> None:
        store = dist.PrefixStore("save/0", self._server.clone())  # type: ignore[attr-defined]
        store.wait([f"{number}/begun"], timedelta(seconds=600))
        partial = folder.with_name(f"{folder.name}.partial")
        record = {"failure": "", "bytes": 0, "sha256": "0" * 64}
        for rank in range(1, self.size):
            rank_file(partial, rank).touch()
            sent = record | ({"cuts": self.cuts[rank]} if number == 1 else {})
            store.set(f"record/{rank}", json.dumps(sent))
        if store.add(f"{number}/written", self.size - 1) == self.size:
            store.set(f"{number}/all", "")


def measure(size: int, sharding: Sharding) -> dict[str, Any]:
    """Seconds of rank 0's CPU in the first save, a later one and a load; and the index's bytes."""
    with tempfile.TemporaryDirectory() as name:
        ranks, folder = SimulatedRanks(size, sharding), Path(name) / "checkpoint-2"
        first = ranks.save(Path(name) / "checkpoint-1", 1)
        later = ranks.save(folder, 2)
        started = time.thread_time()
        fill(folder, Index.read(folder), ranks.parts)
        load = time.thread_time() - started
        index = (folder / INDEX).stat().st_size
    return {"first": first, "later": later, "load": load, "index": index}


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--ranks", type=int, nargs="+", default=[256, 1024])
    args = arguments.parse_args()
    print("seconds of rank 0's CPU (its messages, their kB)")
    for size in args.ranks:
        for sharding in SHARDINGS[1:]:
            found = measure(size, sharding)
            saves = (
                f"{name} save {x['seconds']:.2f} s ({x['messages']}, {x['bytes'] / 1e3:,.0f} kB)"
                for name, x in found.items()
                if name in ("first", "later")
            )
            load = f"load {found['load']:.2f} s, index of {found['index'] / 1e3:,.0f} kB"
            print(f"  {size} ranks, {sharding}: {'; '.join(saves)}; {load}", flush=True)
