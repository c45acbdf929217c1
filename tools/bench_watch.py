"""Measures what the watch of many ranks costs, with a real store and real threads.

    unshare --user --map-root-user --net sh -c \\
        "ip link set lo up && python tools/bench_watch.py --ranks 1024 --each 8 [--json out.json]"

One process serves the store. Others hold the ranks of many nodes, which have a watchdog each but
train nothing. The first node has a process of its own: its leader is the judge. Bytes are those of
the loopback interface, with the headers of TCP and IP, so the interface must be the tool's own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from scalora_dist.distributed.watchdog import Watchdog
from scalora_dist.distributed.world import World

PROCESSES = 4  # that hold the other nodes
SETTLE = 5.0  # seconds after the last rank's start that count as the start


class Part:
    """A process that serves the store, or that holds the ranks of some nodes."""

    def __init__(self, port: int, nodes: range | None, ranks: int, each: int) -> None:
        """
        Args:
            port: the store's.
            nodes: numbers of the nodes, which are their first ranks; None: it serves the store.
            ranks: number of ranks of the job.
            each: number of ranks of a node.
        """
        context = mp.get_context("spawn")
        self.size = each * len(nodes or [])
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_run, args=(theirs, port, nodes, ranks, each), daemon=True
        )
        self.process.start()

    def begin(self) -> None:
        self._pipe.send("begin")

    def wait(self) -> float:
        """The answer to ``begin``, or the first one: what the process sends when it is ready."""
        answer: float = self._pipe.recv()
        return answer

    def cpu(self) -> float:
        """CPU seconds since the process was ready."""
        self._pipe.send("cpu")
        return self.wait()


def measure(ranks: int, each: int, seconds: float) -> dict[str, float]:
    """Start the watch of ``ranks`` ranks, ``each`` a node, and let it run for ``seconds``.

    Returns:
        figures by name. ``start`` counts CPU seconds until ``SETTLE`` seconds after the last rank's
        start; ``second`` counts CPU seconds of a second after that, and bytes on the network.
    """
    store = Part(0, None, ranks, each)
    port = int(store.wait())
    spans = [range(1)]
    spans += [range(each * (n + 1), ranks, each * PROCESSES) for n in range(PROCESSES)]
    parts = [Part(port, nodes, ranks, each) for nodes in spans if nodes]
    for part in parts:
        part.wait()
    sent, begun = _bytes_sent(), time.monotonic()
    for part in parts:
        part.begin()
    for part in parts:
        part.wait()
    took = time.monotonic() - begun
    time.sleep(SETTLE)
    start, sent_at_start = [part.cpu() for part in [store, *parts]], _bytes_sent() - sent
    sent, begun = _bytes_sent(), time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - begun
    sent = _bytes_sent() - sent
    later = [(part.cpu() - at) / passed for part, at in zip([store, *parts], start, strict=True)]
    for part in [store, *parts]:
        part.process.kill()
    return {
        "ranks": ranks,
        "start_seconds": took,
        "start_store": start[0],
        "start_judges_node": start[1],
        "start_mean_rank": sum(start[1:]) / ranks,
        "start_bytes": sent_at_start,
        "second_store": later[0],
        "second_judges_node": later[1],
        "second_mean_rank": sum(later[1:]) / ranks,
        "second_bytes": sent / passed,
    }


def _run(pipe: Connection, port: int, nodes: range | None, ranks: int, each: int) -> None:
    """The main function of a part's process."""
    master = nodes is None
    store = dist.TCPStore("127.0.0.1", port, is_master=master, wait_for_workers=False)
    ready = time.process_time()
    pipe.send(store.port)
    watchdogs: list[Watchdog] = []
    while True:
        if pipe.poll(1):
            if pipe.recv() == "begin":
                worlds = [
                    _world(store, node, n, ranks) for node in nodes or [] for n in range(each)
                ]
                watchdogs = [Watchdog(world) for world in worlds]
                pipe.send(0.0)
            else:
                pipe.send(time.process_time() - ready)
        for watchdog in watchdogs:
            watchdog.at("a step of training")


def _world(store: dist.Store, node: int, number: int, ranks: int) -> World:
    prefixed = dist.PrefixStore("scalora_dist", store)
    return World(node + number, ranks, number, torch.device("cpu"), prefixed)


def _bytes_sent() -> int:
    """Bytes that this machine, or this namespace, has sent to itself."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (loopback,) = [line for line in lines if line.strip().startswith("lo:")]
    return int(loopback.split()[9])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--each", type=int, default=8, help="ranks of a node")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    figures = measure(args.ranks, args.each, args.seconds)
    for name, value in figures.items():
        print(f"{name:20} {value:14.6g}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
