"""A stand-in for Triton's driver of a GPU: kernels are compiled and launches counted. None runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class NoGPU(DriverBase):  # type: ignore[misc]
    """The stand-in.

    Attributes:
        capability: compute capability of the GPU times 10. It is also the device's number, under
            which Triton keeps what it compiled.
        launched: what was given to the launcher, for each launch.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.launched: list[tuple[Any, ...]] = []
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launched.append(arguments)

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        """(module, function, registers of a thread, spilled bytes, most threads)."""
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 96 * 2**10, "warpSize": 32}

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        return None

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    @classmethod
    def is_active(cls) -> bool:
        return True


@contextmanager
def no_gpu(capability: int) -> Iterator[NoGPU]:
    """Triton compiles for a GPU of this compute capability times 10, and launches nothing."""
    driver = NoGPU(capability)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        yield driver
    finally:
        triton.runtime.driver._active = before
