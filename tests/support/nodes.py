"""Two networked nodes for tests, with a group of ranks in each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import launched, runs
from tools.rehearse import nodes


class Node(nodes.Node):
    """One of two nodes."""

    def __init__(self, name: str, number: int, folder: Path) -> None:
        super().__init__(name, number, folder)
        self.caches = folder / f"node{number}-caches"

    def start(self, case: dict[str, Any], **env: Any) -> None:
        """Start a run on this node, with one rank, unless ``env`` differs.

        Args:
            case: options of the run.
            env: environment variables that replace or extend the defaults.
        """
        own_disk = {"HF_DATASETS_CACHE": self.caches}
        ranks = env.pop("NPROC_PER_NODE", 1)
        self.launch(runs.words(case), 2, ranks, launched.ENVIRONMENT | own_disk | env)

    def tokenized(self) -> int:
        """Number of datasets that this node has tokenized."""
        return len(list(self.caches.glob("scalora_dist/tokens-*.arrow")))

    def received(self) -> int:
        """Number of bytes that this node received from the other one."""
        return self.traffic()["rx"]["bytes"]


@contextmanager
def two_nodes(folder: Path) -> Iterator[list[Node]]:
    """Two connected nodes. If they cannot be made, the test is skipped with a warning."""
    try:
        with nodes.connected(2, folder, Node) as made:
            yield made
    except nodes.NoNamespaces as reason:
        warnings.warn(f"NOT TESTED over a network: no namespaces here: {reason}", stacklevel=2)
        pytest.skip(f"network namespaces take root and iproute2: {reason}")
