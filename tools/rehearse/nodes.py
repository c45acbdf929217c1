"""Nodes with a network between them on one machine: Linux's network namespaces and a bridge."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

REPOSITORY = Path(__file__).parents[2]
NETWORK = "10.213.77"


class NoNamespaces(Exception):
    """Network namespaces cannot be made here: they take root and iproute2."""


class Node:
    """One node: a network namespace, in which launch/node.sh is started.

    Attributes:
        name: of its namespace.
        number: its rank among the nodes.
        address: its address in the network.
        log: file of all that its processes print.
        process: what was started last.
    """

    def __init__(self, name: str, number: int, folder: Path) -> None:
        self.name, self.number = name, number
        self.address = f"{NETWORK}.{number + 1}"
        self.log = folder / f"node{number}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def launch(
        self, words: Sequence[str], nodes: int, ranks: int, env: Mapping[str, object]
    ) -> None:
        """Start the shipped launch/node.sh with a run's options.

        Args:
            words: the run's options.
            nodes: number of nodes of the run. This one is among the first.
            ranks: number of this node's ranks.
            env: environment variables that replace or extend the others.
        """
        given = {
            "NNODES": nodes,
            "NODE_RANK": self.number,
            "NPROC_PER_NODE": ranks,
            "MASTER_ADDR": f"{NETWORK}.1",
            "PYTHON": sys.executable,
            **env,
        }
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "launch/node.sh", *words],
                cwd=REPOSITORY,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {name: str(value) for name, value in given.items()},
            )

    def wait(self, seconds: float = 240) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def text(self) -> str:
        return self.log.read_text()

    def errors(self) -> list[str]:
        """The error messages in the log, also those behind a progress bar on the same line."""
        return re.findall(r"\berror: .*", self.text())

    def traffic(self) -> dict[str, dict[str, int]]:
        """{"rx" or "tx": {"bytes" or "packets": what this node has received or sent so far}}."""
        shown = ip("-n", self.name, "-s", "-j", "link", "show", "net0")
        return json.loads(shown)[0]["stats64"]

    def pull_the_cable(self) -> None:
        ip("-n", self.name, "link", "set", "net0", "down")

    def processes(self) -> list[int]:
        """The ids of its processes."""
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def die(self) -> None:
        """Kill all processes of the node. Their connections are closed by this."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


N = TypeVar("N", bound=Node)


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    return done.stdout


@contextmanager
def connected(count: int, folder: Path, kind: type[N]) -> Iterator[list[N]]:
    """``count`` nodes in one network, at ``10.213.77.1`` and so on.

    In them this machine's name resolves to 127.0.1.1, as on Debian. So code that looks up the name
    and sends the address to another node fails.

    Args:
        folder: folder of the logs.
        kind: the class of a node.

    Raises:
        NoNamespaces: they cannot be made.
    """
    nodes = [kind(f"scalora-{os.getpid()}-{n}", n, folder) for n in range(count)]
    switch = f"scalora-{os.getpid()}-switch"
    try:
        try:
            ip("netns", "add", switch)
            ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", switch, "link", "set", "bridge", "up")
            for node in nodes:
                _plug(node, switch)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NoNamespaces(getattr(error, "stderr", None) or error) from error
        yield nodes
    finally:
        for node in nodes:
            with suppress(OSError, subprocess.CalledProcessError):
                node.die()
                ip("netns", "delete", node.name)
            with suppress(OSError):
                (Path("/etc/netns") / node.name / "hosts").unlink()
                (Path("/etc/netns") / node.name).rmdir()
            if node.process:
                node.process.wait(60)
        with suppress(OSError, subprocess.CalledProcessError):
            ip("netns", "delete", switch)


def _plug(node: Node, switch: str) -> None:
    """Make a node's namespace, with a cable to the switch."""
    port = f"port{node.number}"
    ip("netns", "add", node.name)
    ip("-n", node.name, "link", "set", "lo", "up")
    cable = ("name", "net0", "netns", node.name, "type", "veth", "peer", "name", port)
    ip("link", "add", *cable, "netns", switch)
    ip("-n", switch, "link", "set", port, "master", "bridge")
    ip("-n", switch, "link", "set", port, "up")
    ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "net0")
    ip("-n", node.name, "link", "set", "net0", "up")
    hosts = Path("/etc/netns") / node.name / "hosts"
    hosts.parent.mkdir(parents=True)
    hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")


def until(condition: Callable[[], object], nodes: Sequence[Node], seconds: float = 300) -> None:
    """Wait for a condition while all nodes' processes live.

    Raises:
        AssertionError: a node has ended, or it takes longer.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        alive = all(node.process and node.process.poll() is None for node in nodes)
        assert alive and time.monotonic() < deadline, "\n".join(node.text() for node in nodes)
        time.sleep(0.05)
