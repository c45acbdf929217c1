"""Simulates two networked nodes with Linux's network namespaces, with a group of ranks in each."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import launched, runs

ADDRESSES = ("10.213.77.1", "10.213.77.2")


class Node:
    """One node: a network namespace. Its interface to the other node is ``net0`` or ``net1``."""

    def __init__(self, name: str, number: int, folder: Path) -> None:
        self.name, self.number, self.folder = name, number, folder
        self.log = folder / f"node{number}.log"
        self.caches = folder / f"node{number}-caches"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, case: dict[str, Any], **env: Any) -> None:
        """Start the shipped launch/node.sh with a run's options. One rank, unless ``env`` differs.

        Args:
            case: options of the run.
            env: environment variables that replace or extend the defaults.
        """
        given = {
            "NNODES": len(ADDRESSES),
            "NODE_RANK": self.number,
            "NPROC_PER_NODE": 1,
            "MASTER_ADDR": ADDRESSES[0],
            "PYTHON": sys.executable,
            **launched.ENVIRONMENT,
            "HF_DATASETS_CACHE": self.caches,  # a disk of this node's own
            **env,
        }
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "launch/node.sh", *runs.words(case)],
                cwd=runs.REPOSITORY,
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

    def tokenized(self) -> int:
        """Number of datasets that this node has tokenized."""
        return len(list(self.caches.glob("scalora_dist/tokens-*.arrow")))

    def received(self) -> int:
        """Number of bytes that this node received from the other one."""
        shown = ip("-n", self.name, "-s", "-j", "link", "show", f"net{self.number}")
        return json.loads(shown)[0]["stats64"]["rx"]["bytes"]

    def pull_the_cable(self) -> None:
        ip("-n", self.name, "link", "set", f"net{self.number}", "down")

    def die(self) -> None:
        """Kill all processes of the node. Their connections are closed by this."""
        for pid in ip("netns", "pids", self.name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    return done.stdout


@contextmanager
def two_nodes(folder: Path) -> Iterator[list[Node]]:
    """Two connected nodes. If they cannot be made, the test is skipped with a warning.

    In them this machine's name resolves to 127.0.1.1, as on Debian. So code that looks up the name
    and sends the address to the other node fails.
    """
    nodes = [Node(f"scalora-{os.getpid()}-{n}", n, folder) for n in range(2)]
    try:
        try:
            for node in nodes:
                ip("netns", "add", node.name)
                ip("-n", node.name, "link", "set", "lo", "up")
            cable = [word for n in nodes for word in ("name", f"net{n.number}", "netns", n.name)]
            ip("link", "add", *cable[:4], "type", "veth", "peer", *cable[4:])
            for node, address in zip(nodes, ADDRESSES, strict=True):
                device = f"net{node.number}"
                ip("-n", node.name, "address", "add", f"{address}/24", "dev", device)
                ip("-n", node.name, "link", "set", device, "up")
                hosts = Path("/etc/netns") / node.name / "hosts"
                hosts.parent.mkdir(parents=True)
                hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            warnings.warn(f"NOT TESTED over a network: no namespaces here: {reason}", stacklevel=2)
            pytest.skip(f"network namespaces take root and iproute2: {reason}")
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


def until(condition: Callable[[], object], nodes: list[Node], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        alive = all(node.process and node.process.poll() is None for node in nodes)
        assert alive and time.monotonic() < deadline, "\n".join(node.text() for node in nodes)
        time.sleep(0.05)
