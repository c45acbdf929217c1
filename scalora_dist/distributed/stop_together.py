"""Lets a stop signal to one rank count on all, where they do not meet between two steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from torch.distributed import PrefixStore, Store

FOREVER = timedelta(days=365)  # torch prints a warning at the end of each shorter wait
PATIENCE = 10.0  # seconds that a rank waits until all others know. Launchers wait for 30
SIGNAL, KNOW = "signal", "know"


class OtherRanks:
    """Tells the other ranks of a signal over the store, and hears of theirs in a thread."""

    def __init__(self, store: Store, size: int, hear: Callable[[str], None]) -> None:
        """
        Args:
            store: the store of the ranks.
            size: number of ranks.
            hear: called in the thread with the name of another rank's signal.
        """
        self.size = size
        self._hear = hear
        # A wait blocks its connection, so the thread has its own. torch's type of a store leaves
        # `clone` out.
        ears, mouth = store.clone(), store.clone()  # type: ignore[attr-defined]
        self._ears, self._mouth = PrefixStore("stop", ears), PrefixStore("stop", mouth)
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def listen(self) -> None:
        """Start the thread."""
        self._thread.start()

    def tell(self, name: str) -> bool:
        """Send the signal's name to all ranks, and wait until they know it.

        It waits at most PATIENCE, if the store answers. An exit before that would look like a
        crash to the others.

        Returns:
            whether all ranks know it. Not if one has failed: then its launcher has sent the signal.
        """
        deadline = time.monotonic() + PATIENCE
        try:
            self._mouth.set(SIGNAL, name)
            know = self._mouth.add(KNOW, 1)
            while know < self.size and time.monotonic() < deadline:
                time.sleep(0.05)
                know = self._mouth.add(KNOW, 0)
        except RuntimeError:  # the store has ended with rank 0
            return False
        return know >= self.size

    def acknowledge(self) -> None:
        """Let a rank that leaves know that this one knows it."""
        with suppress(RuntimeError):
            self._mouth.add(KNOW, 1)

    def close(self) -> None:
        """End the thread."""
        with suppress(RuntimeError):
            self._mouth.set(SIGNAL, "")
        self._thread.join(PATIENCE)

    def _listen(self) -> None:
        with suppress(RuntimeError):  # the store has ended with rank 0
            self._ears.wait([SIGNAL], FOREVER)
            if name := self._ears.get(SIGNAL).decode():
                self._hear(name)
