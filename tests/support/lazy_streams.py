"""A stand-in for CUDA's streams that runs their work as late, or in any order, as CUDA may.

Work on a stream waits in a queue. A queue keeps its order, and waits for the events it was told to.
Beyond that nothing is ordered: which queue goes on is drawn, or the one that is preferred. So what
gives the right result here for every choice is ordered by streams and events alone.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Event:
    """An event: the latest record of it counts, as in CUDA. One without a record is done."""

    def __init__(self, cuda: LazyCuda) -> None:
        self.cuda = cuda
        self.done: list[bool] = [True]  # of the latest record

    def record(self, stream: Stream) -> None:
        done = [False]
        self.done = done
        stream.put("record", lambda: done.__setitem__(0, True))

    def synchronize(self) -> None:
        done = self.done
        self.cuda.host_waits += not done[0]
        self.cuda.run(lambda: done[0])


class Stream:
    """A queue of (name, whether it may run, work)."""

    def __init__(self, cuda: LazyCuda, name: str) -> None:
        self.cuda = cuda
        self.name = name
        self.queue: deque[tuple[str, Callable[[], bool], Callable[[], Any]]] = deque()
        cuda.streams.append(self)

    def put(self, name: str, work: Callable[[], Any]) -> None:
        self.queue.append((name, lambda: True, work))
        self.cuda.go_on()

    def record_event(self) -> Event:
        event = Event(self.cuda)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        done = event.done
        self.queue.append(("wait", lambda: done[0], lambda: None))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


_Stream = Stream  # LazyCuda has a method of this name, as torch.cuda a class


class LazyCuda(TorchDispatchMode):
    """What a module's ``cuda`` is in a test. In its context non-blocking copies are queued.

    Attributes:
        NAMES: of the main stream, and of those that are made.
        streams: the main stream, then those that were made.
        ran: (stream, work) in the order in which work was done.
        host_waits: how often the host waited for work that was not done.
    """

    NAMES: tuple[str, ...] = ("main", "up", "down")

    def __init__(self, seed: int, prefer: str, *, eager: bool) -> None:
        """
        Args:
            seed: of the choice of streams.
            prefer: the stream that goes on whenever it can; "": none.
            eager: whether some work is done as soon as it is there, and not when the host waits.
        """
        super().__init__()
        self.drawn = random.Random(seed)
        self.prefer = prefer
        self.eager = eager
        self.streams: list[Stream] = []
        self.main = self.now = Stream(self, "main")
        self.ran: list[tuple[str, str]] = []
        self.host_waits = 0

    # What the module calls.

    def Event(self) -> Event:
        return Event(self)

    def Stream(self, device: torch.device) -> Stream:
        return Stream(self, self.NAMES[len(self.streams)])

    def current_stream(self, device: torch.device) -> _Stream:
        return self.main

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    # How work is done.

    def put(self, name: str, work: Callable[[], Any]) -> None:
        self.now.put(name, work)

    def launch(self, name: str, work: Callable[..., Any], *tensors: Tensor) -> None:
        """Queue ``work(*tensors)``."""
        self.put(name, lambda: work(*tensors))

    def go_on(self) -> None:
        while self.eager and self.drawn.random() < 0.5 and self._step():
            pass

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            assert self._step(), "streams wait for each other"

    def _step(self) -> bool:
        ready = [s for s in self.streams if s.queue and s.queue[0][1]()]
        if not ready:
            return False
        preferred = [s for s in ready if s.name == self.prefer]
        stream = preferred[0] if preferred else self.drawn.choice(ready)
        name, _, work = stream.queue.popleft()
        work()
        self.ran.append((stream.name, name))
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default and kwargs.get("non_blocking", args[2:] == (True,)):
            self.launch("copy", func, *args[:2])
            return args[0]
        return func(*args, **kwargs)
