"""Checks of each rank's machine: versions, device, memory, and what differs between nodes."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from scalora_dist.distributed.world import World
from scalora_dist.doctor.finding import Finding
from scalora_dist.profiling.versions import installed_versions

GIB = 2**30
NEEDED = ("scalora_dist", "torch", "transformers", "datasets", "deepspeed")
OPTIONAL = ("bitsandbytes", "flash-attn", "liger-kernel", "peft")
MOST_CLOCK_SKEW = 2.0  # seconds; TensorBoard and caches order files by time
LEAST_HOST_FREE = 0.1  # of the node's memory
LEAST_SHM = GIB // 2  # bytes of /dev/shm; a container often has 64 MiB, which NCCL fills


@dataclass(frozen=True)
class Machine:
    """What one rank knows of its machine and device.

    Attributes:
        host: name of the node.
        versions: {Python or library: version}, of those that are installed.
        device: name of the device.
        unique: what tells this device from others: a GPU's UUID; for a CPU rank its number.
        free: free bytes of the device.
        total: all bytes of the device.
        host_free: available bytes of the node's memory.
        host_total: all bytes of the node's memory.
        shm_free: free bytes of /dev/shm.
        infiniband: names of the node's InfiniBand or RoCE adapters.
        peers: whether this GPU can read the memory of the node's others; None: there is no other.
        gpu: whether the device is a GPU.
        triton: why Triton cannot compile for it; None: it can, or is not needed.
    """

    host: str
    versions: dict[str, str]
    device: str
    unique: str
    free: int
    total: int
    host_free: int
    host_total: int
    shm_free: int
    infiniband: list[str]
    peers: bool | None
    gpu: bool
    triton: str | None = None

    @classmethod
    def here(cls, world: World) -> Machine:
        memory = psutil.virtual_memory()
        host = socket.gethostname()
        device, unique = f"{platform.machine()} CPU", f"{host} rank {world.rank}"
        free, total, peers = memory.available, memory.total, None
        gpu = world.device.type == "cuda"
        if gpu:
            properties = torch.cuda.get_device_properties(world.device)
            device, unique = properties.name, str(properties.uuid)
            free, total = torch.cuda.mem_get_info(world.device)
            mine = world.device.index
            others = [x for x in range(torch.cuda.device_count()) if x != mine]
            if others:
                peers = all(torch.cuda.can_device_access_peer(mine, other) for other in others)
        shm = Path("/dev/shm")
        return cls(
            host=host,
            versions=_versions(),
            device=device,
            unique=unique,
            free=free,
            total=total,
            host_free=memory.available,
            host_total=memory.total,
            shm_free=shutil.disk_usage(shm).free if shm.is_dir() else 0,
            infiniband=sorted(x.name for x in Path("/sys/class/infiniband").glob("*")),
            peers=peers,
            gpu=gpu,
            triton=_triton_problem() if gpu else None,
        )


def _triton_problem() -> str | None:
    try:
        from scalora_dist.core import merge_kernel
    except ImportError:
        return "it is not installed"
    return merge_kernel.problem()


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), **installed_versions(*NEEDED, *OPTIONAL)}
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def check(world: World, compare: Callable[[list[Machine]], Finding]) -> Finding:
    """Compare all ranks' machines. Called on every rank; the same finding on each."""
    answers = world.exchange(json.dumps(asdict(Machine.here(world))))
    return compare([Machine(**json.loads(answer)) for answer in answers])


def compare_versions(machines: list[Machine]) -> Finding:
    first = machines[0]
    found = ", ".join(f"{name} {number}" for name, number in first.versions.items())
    without = [name for name in OPTIONAL if name not in first.versions]
    if without:
        found += f"; not installed: {', '.join(without)}"
    for rank, other in enumerate(machines):
        names = sorted(
            name
            for name in first.versions.keys() | other.versions.keys()
            if first.versions.get(name) != other.versions.get(name)
        )
        if names:
            theirs = ", ".join(f"{name} {other.versions.get(name, 'missing')}" for name in names)
            return Finding(
                f"{found}; on rank {rank} ({other.host}): {theirs}",
                "install the same versions on all nodes, those of constraints.txt",
            )
    return Finding(found)


def compare_devices(machines: list[Machine]) -> Finding:
    kinds = sorted({machine.device for machine in machines})
    found = f"{len(machines)} of {', '.join(kinds)}"
    ranks: dict[str, int] = {}
    for rank, machine in enumerate(machines):
        other = ranks.setdefault(machine.unique, rank)
        if other != rank:
            return Finding(
                f"{found}; ranks {other} and {rank} have the same GPU of {machine.host}",
                "start one rank for each GPU that CUDA_VISIBLE_DEVICES shows",
            )
    if len(kinds) > 1:
        return Finding(
            found,
            "the slowest kind sets the pace, and copies of weights may round differently: take one "
            "kind, or ZeRO-3, or FSDP2 without a hybrid mesh",
            fatal=False,
        )
    for machine in machines:
        if machine.triton:
            return Finding(
                f"{found}; Triton cannot compile on {machine.host} ({machine.triton})",
                "install triton, a C compiler and Python's headers there: merges into W are slower "
                "without, and --torch_compile does not work",
                fatal=False,
            )
    return Finding(found)


def compare_memory(machines: list[Machine]) -> Finding:
    host = min(machines, key=lambda machine: machine.host_free)
    found = f"{_gib(host.host_free)} of {_gib(host.host_total)} GiB free on {host.host}"
    gpus = [machine for machine in machines if machine.gpu]
    if gpus:
        fullest = min(gpus, key=lambda machine: machine.free / machine.total)
        found += (
            f"; {_gib(fullest.free)} of {_gib(fullest.total)} GiB free on a GPU of {fullest.host}"
        )
        if fullest.free < 0.9 * fullest.total:
            return Finding(
                found,
                f"something else uses a GPU of {fullest.host}: nvidia-smi shows what; stop it, or "
                "plan with scalora plan --reserve",
                fatal=False,
            )
        smallest = min(machine.shm_free for machine in gpus)
        if len(machines) > 1 and smallest < LEAST_SHM:
            return Finding(
                f"{found}; /dev/shm has {smallest / 2**20:.0f} MiB free",
                "NCCL may need more: start the container with --shm-size 8g or --ipc host",
                fatal=False,
            )
    if host.host_free < LEAST_HOST_FREE * host.host_total:
        return Finding(
            found,
            f"something else uses the memory of {host.host}: `ps aux --sort -rss` shows what",
            fatal=False,
        )
    return Finding(found)


def compare_links(machines: list[Machine]) -> Finding:
    adapters = sorted({name for machine in machines for name in machine.infiniband})
    found = f"InfiniBand or RoCE: {', '.join(adapters) or 'none'}"
    if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        found += f"; gloo takes {interface}"
    peers = [machine.peers for machine in machines if machine.peers is not None]
    if peers and all(peers):
        found += "; the GPUs of a node read each other's memory"
    elif peers:
        return Finding(
            f"{found}; GPUs of a node do not read each other's memory",
            "their messages go through the host, which is slow: look for IOMMU or ACS settings, "
            "and at nvidia-smi topo -m",
            fatal=False,
        )
    if machines[0].gpu and not adapters and len({machine.host for machine in machines}) > 1:
        return Finding(
            found,
            "NCCL will use TCP between the nodes; if they have InfiniBand, pass /dev/infiniband "
            "into the container",
            fatal=False,
        )
    return Finding(found)


CHECKS: dict[str, Callable[[list[Machine]], Finding]] = {
    "versions": compare_versions,
    "devices": compare_devices,
    "memory": compare_memory,
    "links": compare_links,
}


def check_clocks(world: World) -> Finding:
    """The clocks of all ranks, read right after a barrier. A collective."""
    world.sum(0.0)
    now = time.time()
    latest, earliest = world.max(now, -now)
    apart = latest + earliest
    found = f"within {apart:.1f} s of each other"
    if apart < MOST_CLOCK_SKEW:
        return Finding(found)
    return Finding(
        found,
        "set the nodes' clocks by NTP (chrony): TensorBoard and caches order files by time",
        fatal=False,
    )


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}"
