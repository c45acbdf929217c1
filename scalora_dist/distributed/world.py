"""The process group of a run: rank, device, small collectives, and waits without a collective."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar, cast

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from scalora_dist.core import host
from scalora_dist.core.arithmetic import mostly_padding
from scalora_dist.distributed.cores import cores
from scalora_dist.distributed.stop_together import FOREVER
from scalora_dist.errors import UserError

T = TypeVar("T")
# Of each rank to the store: its own, two for stop signals, and two of the watchdog, if it leads.
CONNECTIONS = 5
OTHERS, LEAST_OTHERS = 1024, 128  # open files for all else: the usual limit, and what suffices
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """The process group in one object; NCCL on GPUs, gloo on CPU ranks.

    Attributes:
        rank: this process's rank in the run.
        size: world size.
        local_rank: this process's rank on its node, by `places_on_nodes`.
        device: device of the model and of all communication buffers.
        store: key-value store that the group was created with.
        nodes: number of nodes; the ranks of each node are consecutive.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store
    nodes: int = 1
    _calls: Iterator[int] = field(default_factory=itertools.count, repr=False)  # same on all ranks

    @classmethod
    def join(cls, *, local_rank: int | None = None, timeout: timedelta) -> World:
        """Join the group that the launcher's environment describes; without one, run alone.

        Args:
            local_rank: rank on this node, from the launcher's command line; None or negative:
                LOCAL_RANK.
            timeout: time-out of every collective.

        Raises:
            UserError: rank 0 may not open as many files as there will be connections to its store.
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
        _set_threads(on_cpu=not cuda)
        # Else a gloo group connects all pairs of ranks when it is made: a million at 1,024 ranks.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        if os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            allow_open_files(int(os.environ["WORLD_SIZE"]))
        if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := _interface()):
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timeout
        )
        world = cls(rank, size, local_rank, device, dist.PrefixStore("scalora_dist", store))
        places = places_on_nodes(world.gather_rows(torch.tensor([local_rank])).tolist())
        return replace(world, local_rank=places[rank], nodes=places.count(0))

    def new_name(self) -> str:
        """A name for keys of the store: the same on all ranks, and new with every call."""
        return str(next(self._calls))

    def leave(self) -> None:
        """Leave the group. Without this call, NCCL warns of leaked resources."""
        dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each number summed over all ranks, in float64. One all-reduce, one wait for the device.

        Tensors are scalars on any device. Those on ``device`` are not read before the sum.
        """
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: float | Tensor) -> list[float]:
        """The maximum of each number over all ranks, in float64; as ``sum``."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def largest(self, number: Tensor) -> Tensor:
        """The maximum of a scalar over all ranks, on its device. One all-reduce, in place."""
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return number

    def agree(self, number: float) -> bool:
        """Whether all ranks have the same number; all get the same answer. One all-reduce."""
        high, low = self.max(number, -number)
        return high == -low

    def _reduce(
        self, values: tuple[float | Tensor, ...], op: dist.ReduceOp.RedOpType
    ) -> list[float]:
        here = [isinstance(value, Tensor) and value.device == self.device for value in values]
        numbers = [0.0 if on else float(value) for value, on in zip(values, here, strict=True)]
        message = host.to_device(torch.tensor(numbers, dtype=torch.float64), self.device)
        for place, value, on in zip(message, values, here, strict=True):
            if on:
                place.copy_(value)
        dist.all_reduce(message, op=op)
        return host.on_host(Tensor.tolist, message)

    def from_rank_0(self, tensor: Tensor) -> Tensor:
        """Rank 0's ``tensor`` on every rank, for a tensor that all ranks computed. One broadcast.

        On different kinds of processors, the ranks' own results may differ in the last bit.
        """
        message = host.to_device(tensor.contiguous(), self.device)
        dist.broadcast(message, src=0)
        return message if tensor.device == self.device else host.on_host(lambda copy: copy, message)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """``rows`` (k, …) of all ranks, in rank order, as (size·k, …). One all-gather."""
        rows = host.to_device(rows.contiguous(), self.device)
        everyone = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(everyone, rows)
        return everyone

    def gather_table(self, rows: Tensor, count: int) -> Tensor:
        """A table of ``count`` rows on every rank, of which each rank has a share, in rank order.

        One all-gather. One all-reduce instead where that would be mostly padding, as it is with
        more ranks than rows: each row is on one rank, so the sums are exact.

        Args:
            rows: this rank's share, (ceil(count / size), …). Those past the table are not read.
        """
        if not mostly_padding(count, self.size):
            return self.gather_rows(rows)[:count]
        table = torch.zeros(count, *rows.shape[1:], dtype=rows.dtype, device=self.device)
        mine = table[self.rank * len(rows) :][: len(rows)]
        mine.copy_(host.to_device(rows, self.device)[: len(mine)])
        dist.all_reduce(table)
        return table

    def exchange(
        self, text: str, name: str | None = None, patience: float | None = None
    ) -> list[str]:
        """Every rank's text, in rank order. Over the store, so it works after a failed collective.

        Args:
            name: of this exchange, never used before. It then meets the others' even where an error
                has left out calls before it.
            patience: seconds to wait for the other ranks; None: for as long as it takes.

        Raises:
            TimeoutError: some ranks did not call it in that time.
        """
        name = name or self.new_name()
        keys = [f"text/{name}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], text)
        try:
            self.store.wait(keys, FOREVER if patience is None else timedelta(seconds=patience))
        except dist.DistStoreError as error:
            raise TimeoutError from error
        return [each.decode() for each in self.store.multi_get(keys)]

    def main_only(self, work: Callable[[], T]) -> T | None:
        """Run ``work`` on rank 0 while the others wait. Returns its result there, None elsewhere.

        They wait on the store, not in a collective, so rank 0 may take longer than the time-out.

        Raises:
            UserError: on the waiting ranks, where ``work`` raised any exception on rank 0. Rank 0
                raises that exception.
        """
        return self._while_others_wait(work, self.is_main, workers=1)

    def json_from_rank_0(self, read: Callable[[], T]) -> T:
        """What ``read`` returns on rank 0, on every rank, which waits for it as in ``main_only``.

        Args:
            read: called on rank 0 only. Returns JSON values; tuples arrive as lists.

        Raises:
            UserError: on the waiting ranks, where ``read`` raised on rank 0.
        """
        name = f"told/{self.new_name()}"
        self.main_only(lambda: self.store.set(name, json.dumps(read())))
        return cast(T, json.loads(self.store.get(name)))

    def node_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0, then on the first rank of every other node, then on the rest.

        If each node has its own disk, ``work`` fills a cache once per node. If the nodes share a
        disk, rank 0 fills the cache alone, and no two nodes write to it at the same time.

        So ``work`` may download from a hub. ``scalora train`` lets only the first rank of each node
        ask one (``cli.train``); the rest find the files in the cache.

        Raises:
            UserError: on the waiting ranks, where ``work`` raised any exception on a node's first
                rank. That rank raises the exception.
        """
        result = self.main_only(work)
        leads = self.local_rank == 0 and not self.is_main
        if self.nodes > 1:
            led = self._while_others_wait(work, leads, workers=self.nodes - 1)
            result = led if leads else result
        return cast(T, result) if leads or self.is_main else work()

    def from_node_first(self, make: Callable[[], str], read: Callable[[str], T]) -> T:
        """As ``node_first``, but ``make`` runs on the first rank of each node alone.

        The other ranks of the node get its result over the store. All ranks return what ``read``
        makes of it.
        """
        name, first = f"from/{self.new_name()}", self.rank - self.local_rank

        def work() -> T:
            if self.rank != first:
                return read(self.store.get(f"{name}/{first}").decode())
            text = make()
            result = read(text)
            self.store.set(f"{name}/{first}", text)
            return result

        return self.node_first(work)

    def _while_others_wait(self, work: Callable[[], T], works: bool, workers: int) -> T | None:
        """Run ``work`` on the ranks where ``works`` is true; all ranks return when it is done."""
        name, result = f"work/{self.new_name()}", None
        if works:
            try:
                result = work()
            except BaseException as error:
                message = str(error) or type(error).__name__
                self.store.set(name, message if self.is_main else f"rank {self.rank}: {message}")
                # The store ends with rank 0's node: first let the others read the message.
                deadline = time.monotonic() + 10
                missing = self.store.add(f"{name}/read", 1) < self.size
                while missing and time.monotonic() < deadline:
                    time.sleep(0.02)
                    missing = self.store.add(f"{name}/read", 0) < self.size
                raise
            if self.store.add(f"{name}/done", 1) == workers:
                self.store.set(name, "")
        self.store.wait([name], FOREVER)  # a dead rank 0 would break the connection
        message = self.store.get(name).decode()
        self.store.add(f"{name}/read", 1)
        if message:
            raise UserError(message)
        return result


def places_on_nodes(local_ranks: list[int]) -> list[int]:
    """Each rank's number on its node, 0 for the first one, given all launchers' LOCAL_RANK.

    A rank whose LOCAL_RANK does not fit, because the ranks of its node are not consecutive or their
    first one is missing, counts as the first rank of a node of its own.
    """
    firsts = [rank - place for rank, place in enumerate(local_ranks)]
    fit = [first >= 0 and local_ranks[first] == 0 for first in firsts]
    return [place if fits else 0 for place, fits in zip(local_ranks, fit, strict=True)]


def allow_open_files(ranks: int) -> None:
    """Raise the soft limit of open files to what serving the store to ``ranks`` ranks takes.

    Raises:
        UserError: the hard limit leaves no room for the connections.
    """
    connections = CONNECTIONS * ranks
    soft, hard = (
        math.inf if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    if hard < connections + LEAST_OTHERS:
        raise UserError(
            f"rank 0 needs {connections + LEAST_OTHERS} open files to serve {ranks} ranks, and its "
            f"hard limit is {hard}: raise it (ulimit -Hn, LimitNOFILE of systemd, --ulimit nofile "
            "of Docker)"
        )
    if soft < (wanted := min(connections + OTHERS, hard)):
        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(wanted), limit))


def _set_threads(*, on_cpu: bool) -> None:
    """Give this rank its share of the cores as threads, unless OMP_NUM_THREADS decides.

    torchrun sets it to 1 where the user has not set it. Nothing tells that from the user's own 1,
    so it stays, and ranks that compute on a CPU are told what they lose.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "0")))
    threads = max(1, cores() // (here or int(os.environ["WORLD_SIZE"])))
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None:
        torch.set_num_threads(threads)
        return
    by_torchrun = given == "1" and "TORCHELASTIC_RUN_ID" in os.environ
    if by_torchrun and on_cpu and threads > 1 and os.environ["RANK"] == "0":
        logger.warning(
            "each rank uses 1 of its %d cores, torchrun's default: set OMP_NUM_THREADS=%d",
            threads,
            threads,
        )


def _interface() -> str | None:
    """The network interface that leads to the first node; None on one node, or where unknown.

    By default, gloo takes the interface that this machine's name resolves to. On Debian and in
    containers this is often the loopback, which reaches no other node.
    """
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    if here in (None, os.environ["WORLD_SIZE"]):
        return None
    try:
        found = socket.getaddrinfo(os.environ["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            mine = probe.getsockname()[0]
    except OSError:
        return None
    if mine.startswith("127.") or mine == "::1":  # one machine, or the first node's own name
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, known in interfaces if mine in [a.address for a in known]), None)
