"""Functions that ranks run in tests/engines/test_order.py, with stand-ins for streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from scalora_dist.distributed.world import World
from scalora_dist.engines.deepspeed import DeepSpeedEngine
from tests.support import toy


class Stream:
    """A stream that runs nothing, and an event on it.

    Attributes:
        seen: number of writes that are over when its next work begins.
    """

    def __init__(self, **_: Any) -> None:
        self.seen = 0

    def wait_stream(self, other: Stream) -> None:
        self.seen = max(self.seen, other.seen)

    def record_event(self) -> Stream:
        event = Stream()
        event.seen = self.seen
        return event

    wait_event = wait_stream

    def record(self, stream: Stream | None = None) -> None:
        current: Any = torch.cpu.current_stream()
        self.seen = (stream or current).seen

    def synchronize(self) -> None: ...


class Device:
    """A device whose current stream writes, and whose other streams may be late.

    Attributes:
        current: the current stream.
        writes: number of writes so far.
        late: (stream, number of writes that it did not wait for) of each piece of work of another
            stream.
    """

    def __init__(self) -> None:
        self.main = self.current = Stream()
        self.writes = 0
        self.late: list[tuple[Stream, int]] = []

    def write(self) -> None:
        assert self.current is self.main
        self.writes += 1
        self.main.seen = self.writes

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        self.late.append((stream, self.writes - stream.seen))
        try:
            yield
        finally:
            self.current = before


@contextmanager
def streams() -> Iterator[Device]:
    """Inside it, engines take the CPU for a device with streams."""
    device, accelerator = Device(), type(get_accelerator())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("is_synchronized_device", "resolves_data_dependency"):
            patch.setattr(accelerator, name, lambda _: False)
        patch.setattr(accelerator, "handles_memory_backpressure", lambda _: True)
        patch.setattr(accelerator, "Stream", Stream)
        patch.setattr(accelerator, "stream", lambda _, stream: device.stream(stream))
        patch.setattr(accelerator, "default_stream", lambda *_: device.main)
        patch.setattr(accelerator, "current_stream", lambda *_: device.current)
        patch.setattr(torch.Tensor, "record_stream", lambda *_: None)
        patch.setattr(torch.cpu, "Stream", Stream)
        patch.setattr(torch.cpu, "Event", Stream, raising=False)
        patch.setattr(torch.cpu, "stream", device.stream)
        patch.setattr(torch.cpu, "current_stream", lambda *_: device.current)
        yield device


def late_gathers(world: World, engine: str, *, ordered: bool = True) -> dict[str, list[int]]:
    """For each gather of weights after a kind of write: how many writes it did not wait for.

    The kinds: "between steps", and "step" (the engine's own, after a transform's).

    Args:
        ordered: whether ``Engine.order_writes`` does anything.
    """
    with streams() as device:
        run = toy.Run(world, engine=engine, dtype="bf16")
        if not ordered:
            run.engine.order_writes = lambda: None  # type: ignore[method-assign]
        run.step(0)
        run.step(1)  # DeepSpeed has recorded the order of modules
        found = {}
        device.late.clear()
        with run.engine.writing():
            for layer in run.engine.layer_shards(gradients=False):
                layer.W.local.mul_(2)
                device.write()
        run.output()
        found["between steps"] = late(run, device)
        run.backward(2)
        run.rescale()
        device.write()
        run.engine.optimizer.register_step_post_hook(lambda *_: device.write())
        run.finish_step(True)
        device.late.clear()
        run.output()
        found["step"] = late(run, device)
        assert device.writes > len(toy.SHAPES) + 1
    return found


def late(run: toy.Run, device: Device) -> list[int]:
    """The writes that each gather missed."""
    engine: Any = run.engine
    if isinstance(engine, DeepSpeedEngine):
        gathers = [engine.shards.gather_stream]
    else:
        shared = engine.model._get_fsdp_state()._comm_ctx
        gathers = [shared.all_gather_copy_in_stream, shared.all_gather_stream]
    return [missed for stream, missed in device.late if any(stream is x for x in gathers)]
