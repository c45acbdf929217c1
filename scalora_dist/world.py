"""The ranks of one run: who we are, where messages live, and how to wait without a collective."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from scalora_dist.errors import UserError

T = TypeVar("T")
POLL = timedelta(seconds=30)  # how long one wait on the store lasts before the next


@dataclass(frozen=True)
class World:
    """The process group in one object; NCCL on GPUs, gloo on CPU ranks.

    Attributes:
        rank, size: of the whole run. local_rank: on this node.
        device: where the model and every message live.
        store: the key-value store the group was made with.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store
    _calls: Iterator[int] = field(default_factory=itertools.count, repr=False)  # alike on all ranks

    @classmethod
    def join(cls, *, local_rank: int | None = None, timeout: timedelta) -> World:
        """Join the group that the launcher's environment describes (alone where there is none).

        Args:
            local_rank: from the launcher's command line, else LOCAL_RANK.
            timeout: of every collective.
        """
        defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = "0" if os.environ["WORLD_SIZE"] == "1" else "29500"
        if local_rank is None or local_rank < 0:
            local_rank = int(os.environ["LOCAL_RANK"])
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        elif "OMP_NUM_THREADS" not in os.environ:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "0")))
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // (here or int(os.environ["WORLD_SIZE"]))))
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timeout
        )
        return cls(rank, size, local_rank, device, dist.PrefixStore("scalora_dist", store))

    def leave(self) -> None:
        """Leave the group in good order: without it NCCL warns of leaked resources."""
        dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each number summed over all ranks, in float64: one all-reduce."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: float | Tensor) -> list[float]:
        """The largest of each number over all ranks, in float64: one all-reduce."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def agree(self, number: float) -> bool:
        """Whether all ranks hold the same number, the same answer everywhere: one all-reduce."""
        high, low = self.max(number, -number)
        return high == -low

    def _reduce(
        self, values: tuple[float | Tensor, ...], op: dist.ReduceOp.RedOpType
    ) -> list[float]:
        numbers = [torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values]
        message = torch.stack(numbers)
        dist.all_reduce(message, op=op)
        return message.tolist()

    def same(self, tensor: Tensor) -> Tensor:
        """Rank 0's ``tensor`` on every rank, where it was to be the same anyway: one broadcast.

        What each rank computes by itself may differ in the last bit, on processors of two kinds.
        """
        message = tensor.to(self.device).contiguous()
        dist.broadcast(message, src=0)
        return message.to(tensor.device)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(k, …) of every rank as (size·k, …), in rank order, on every rank: one all-gather."""
        rows = rows.to(self.device).contiguous()
        everyone = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(everyone, rows)
        return everyone

    def main_only(self, work: Callable[[], T]) -> T | None:
        """Run ``work`` on rank 0 while the others wait; its result there, None elsewhere.

        They wait on the store, not in a collective, so rank 0 may take longer than the time-out.

        Raises:
            UserError: on every rank where rank 0's ``work`` raised one.
        """
        name = f"main_only/{next(self._calls)}"
        if not self.is_main:
            while True:
                try:
                    self.store.wait([name], POLL)
                    break
                except dist.DistStoreError:
                    continue  # still at work; a dead rank 0 breaks the connection instead
            message = self.store.get(name).decode()
            self.store.add(f"{name}/read", 1)
            if message:
                raise UserError(message)
            return None
        try:
            result = work()
        except BaseException as error:
            self.store.set(name, str(error) or type(error).__name__)
            # The store goes with this process: let the others read before it leaves.
            deadline = time.monotonic() + 10
            while self.store.add(f"{name}/read", 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(0.02)
            raise
        self.store.set(name, "")
        return result

    def main_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 and then, its results being cached, on the others."""
        result = self.main_only(work)
        return cast(T, result) if self.is_main else work()
