"""A GPU without memory: code for ``cuda:0`` runs op by op, on any machine, in a group of any size.

Tensors on "cuda" are torch's fake tensors: shapes, dtypes and devices, no values. Tensors on the
CPU are real. So Python runs as on a GPU, and fails where it would: where devices mix, or where a
collective is given a tensor on the CPU, which NCCL does not take. ``KernelCount("cuda")`` inside
counts what the GPU would do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scalora_dist.core import host_pieces, split_precision
from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.core.merge_kernel import merge_range_
from scalora_dist.distributed.world import World
from scalora_dist.profiling.kernels import note_wait
from scalora_dist.profiling.launches import masks_of

CUDA = torch.device("cuda", 0)
LAZY = torch.device("lazy", 0)
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class FakeWorld(World):
    """A World whose other ranks do not exist: they are taken to send what this rank sends."""

    def _reduce(
        self, values: tuple[float | Tensor, ...], op: dist.ReduceOp.RedOpType
    ) -> list[float]:
        super()._reduce(values, op)  # as a GPU would, but its memory has forgotten the numbers
        ranks = self.size if op == dist.ReduceOp.SUM else 1
        return [
            (0.0 if value.dtype == torch.bool else 1.0)  # nothing on the GPU is wrong
            if isinstance(value, FakeTensor)
            else ranks * float(value)
            for value in values
        ]

    def exchange(
        self, text: str, name: str | None = None, patience: float | None = None
    ) -> list[str]:
        return [text] * self.size

    def json_from_rank_0(self, read: Callable[[], Any]) -> Any:
        return read()

    def node_first(self, work: Callable[[], Any]) -> Any:
        return work()

    def from_node_first(self, make: Callable[[], str], read: Callable[[str], Any]) -> Any:
        return read(make())

    def _while_others_wait(
        self, work: Callable[[], Any], works: bool, workers: int
    ) -> Any:  # the result of `work`, None where this rank does not work
        return work() if works else None


@contextmanager
def fake_gpu(rank: int = 0, size: int = 1) -> Iterator[FakeWorld]:
    """Code inside ``with`` runs on rank ``rank`` of ``size`` ranks with a GPU each.

    What a collective would receive has no values. A copy from the GPU to the host gives a stand-in:
    symmetric positive definite matrices where the last two dimensions are equal, else ones. Where
    the GPU's values decide about a shape, they are all taken to be true.

    Raises:
        RuntimeError: there is a process group already.
    """
    _set_cuda_guard()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        world = FakeWorld(
            rank=rank,
            size=size,
            local_rank=0,  # there is no other rank that it could wait for
            device=CUDA,
            store=dist.HashStore(),
            nodes=ceil_div(size, GPUS_PER_NODE),
        )
        with ExitStack() as stack:
            # Triton's operators are fake here, and compile nothing.
            stack.enter_context(patch.object(split_precision, "_kernel", lambda: merge_range_))
            for name, value in _CUDA_MODULE.items():
                stack.enter_context(patch.object(torch.cuda, name, value))
            local = property(lambda tensor: tensor._local_tensor.device)
            stack.enter_context(patch.object(DTensor, "device", local, create=True))
            # FakeTensor has a Python `device` of its own, but not these.
            is_cuda = property(lambda tensor: tensor.device.type == "cuda")
            stack.enter_context(patch.object(FakeTensor, "is_cuda", is_cuda, create=True))
            stack.enter_context(patch.object(FakeTensor, "tolist", lambda x: x.cpu().tolist()))
            # C++ takes no stream of Python's, and there is no memory that it could keep.
            stack.enter_context(patch.object(FakeTensor, "record_stream", _no_op, create=True))
            # Streams of this GPU are not those of another one, or of the machine's.
            stack.enter_context(patch.dict(host_pieces._on_device, clear=True))
            # torch's optimizers handle tensors of these types many at a time, on "cuda".
            for name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
                types = f"{name}._foreach_supported_types"
                known = [torch.Tensor, nn.Parameter, DTensor, FakeTensor]
                stack.enter_context(patch(types, known))
            mode = _FakeCuda()
            made = partial(dist.new_group, backend="fake")
            stack.enter_context(patch.object(dist, "new_group", made))
            # Objects go over tensors on the CPU here, and there is nobody to change them.
            stack.enter_context(patch.object(dist, "broadcast_object_list", lambda *a, **k: None))
            stack.enter_context(patch.object(nn.Module, "_apply", _moves()))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(mode)
            yield world
    finally:
        dist.destroy_process_group()


class _FakeCuda(TorchDispatchMode):
    """Keeps the CPU real while "cuda" is fake.

    A fake tensor has a device in Python, and is asked for it by C++ as well. C++ gets "lazy", a
    device that nothing else uses: torch's CPU build has no autograd engine for "cuda".
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned: WeakSet[torch.UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return LAZY
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls the operators on its parts, which come here again
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            # C++ passes on the "lazy" that it was told.
            kwargs["device"] = CUDA if device.type in ("cuda", "lazy") else device
        if func.namespace == "c10d" and not func._opname.startswith("barrier"):
            self._check_devices(func._opname, args)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = any(isinstance(x, FakeTensor) for x in tensors)
        if not on_gpu and kwargs.get("device") != CUDA:
            return self._on_host(func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            with unset_fake_temporarily():
                return stand_in(args[0]).item()
        if func is torch.ops.aten.nonzero.default:
            return torch.stack(_all_of(args[0]), dim=1)
        if func._opname in ("index", "index_put", "index_put_"):
            indices = [
                index
                for given in args[1]
                for index in (_all_of(given) if masks_of([given]) else [given])
            ]
            args = (args[0], indices, *args[2:])
        if func is torch.ops.aten._to_copy.default:
            return self._copied(func, args[0], kwargs)
        if func is torch.ops.aten.copy_.default and not isinstance(args[0], FakeTensor):
            values = stand_in(args[1])
            with unset_fake_temporarily():
                return args[0].copy_(values)
        return func(*args, **kwargs)

    def _check_devices(self, name: str, args: Any) -> None:
        for leaf in tree_leaves(args):
            if isinstance(leaf, Tensor) and leaf.device.type != "cuda":
                raise RuntimeError(f"{name} of a tensor on {leaf.device}: NCCL takes GPU tensors")

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        with unset_fake_temporarily():
            if func is torch.ops.aten._pin_memory.default:
                copy = args[0].clone()
                self.pinned.add(copy.untyped_storage())
                return copy
            if func is torch.ops.aten.is_pinned.default:
                return args[0].untyped_storage() in self.pinned
            pinned = kwargs.pop("pin_memory", False)
            out = func(*args, **kwargs)
            if pinned:
                self.pinned.add(out.untyped_storage())
            return out

    def _copied(self, func: Any, tensor: Tensor, kwargs: Any) -> Tensor:
        device = torch.device(kwargs.get("device") or tensor.device)
        dtype = kwargs.get("dtype") or tensor.dtype
        if device.type == "cpu":
            with unset_fake_temporarily():
                return stand_in(tensor).to(dtype)
        layout = kwargs.get("memory_format") not in (None, torch.preserve_format)
        if layout or device != tensor.device or dtype != tensor.dtype:
            return func(tensor, **kwargs)
        return torch.ops.aten.alias.default(tensor)  # C++ took "lazy" for another device


def stand_in(tensor: Tensor) -> Tensor:
    """A real tensor on the CPU with the shape and dtype of a fake one."""
    with unset_fake_temporarily():
        shape = tensor.shape
        ones = torch.ones(shape, dtype=tensor.dtype)
        if not (tensor.is_floating_point() and len(shape) > 1 and shape[-1] == shape[-2] > 1):
            return ones
        columns = torch.randn(2 * shape[-1], shape[-1], generator=torch.Generator().manual_seed(0))
        gram = columns.T @ columns / len(columns)
        return gram.to(tensor.dtype).expand(shape).clone()


def _all_of(mask: Tensor) -> list[Tensor]:
    """The indices of a mask's elements, for each dimension, as if all were true."""
    count, device = mask.numel(), mask.device
    return [torch.empty(count, dtype=torch.int64, device=device) for _ in mask.shape]


def _moves() -> Callable[..., nn.Module]:
    """A ``Module._apply``, for ``to`` and the like: torch's own cannot move a fake parameter.

    Tied parameters stay tied. Parameters that are where they belong stay the same objects.
    """
    moved: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # by id, which the first one keeps

    @torch.no_grad()
    def apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for child in module.children() if recurse else ():
            apply(child, change)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            new = change(parameter.detach())
            if new.device == parameter.device and new.dtype == parameter.dtype:
                continue
            if id(parameter) not in moved:
                moved[id(parameter)] = parameter, nn.Parameter(new, parameter.requires_grad)
            module._parameters[name] = moved[id(parameter)][1]
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else change(buffer)
        return module

    return apply


class FakeStream:
    """Stands for torch.cuda.Stream and Event. All work is done as it is called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *args: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> FakeStream:
        return FakeStream()

    def wait(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        note_wait("synchronize")

    def elapsed_time(self, other: FakeStream) -> float:
        return 0.0


def _synchronize(device: Any = None) -> None:
    FakeStream().synchronize()


def _no_op(*args: Any) -> None: ...


# What replaces the functions of torch.cuda that the CPU build lacks.
_CUDA_MODULE = {
    "Stream": FakeStream,
    "Event": FakeStream,
    "current_stream": FakeStream,
    "default_stream": FakeStream,
    "stream": lambda stream: nullcontext(),
    "synchronize": _synchronize,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_capability": lambda device=None: (9, 0),
    "mem_get_info": lambda device=None: (80 * 2**30, 80 * 2**30),
    "memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
    "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda state, device=None: None,
}


def _set_cuda_guard() -> None:
    """Give torch's CPU build a device guard for "cuda" that does nothing.

    FakeTensorMode asks torch for one, but torch sets it only in builds with CUDA where it finds no
    GPU: where there is a guard that counts 0 devices. So register a guard whose functions all
    return 0. torch calls one of them, once, and replaces it.
    """
    global _guard_is_set
    if torch.cuda._is_compiled() or _guard_is_set:
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    zero = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    functions = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
    guard = (ctypes.c_void_p * 1)(ctypes.addressof(functions))
    # c10::impl::DeviceGuardImplRegistrar(DeviceType, const DeviceGuardImplInterface*)
    namespace, name = "N3c104impl", "24DeviceGuardImplRegistrar"
    arguments = "ENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE"
    register = library[f"_Z{namespace}{name}C1{arguments}"]
    register(ctypes.create_string_buffer(8), ctypes.c_int8(1), ctypes.byref(guard))  # 1: CUDA
    torch._C._ensureCUDADeviceGuardSet()
    _guard_is_set = True


_guard_is_set = False
