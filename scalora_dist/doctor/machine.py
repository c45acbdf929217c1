"""Checks of each rank's machine: versions, device, memory, and what differs between nodes."""

from __future__ import annotations

import os
import platform
import socket
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from scalora_dist.distributed.world import World
from scalora_dist.doctor.finding import Finding

GIB = 2**30
NEEDED = ("scalora_dist", "torch", "transformers", "datasets", "deepspeed")
OPTIONAL = ("bitsandbytes", "flash-attn", "liger-kernel", "peft")
MOST_CLOCK_SKEW = 2.0  # seconds; TensorBoard and caches order files by time


@dataclass(frozen=True)
class Machine:
    """What one rank knows of its machine and device.

    Attributes:
        host: name of the node.
        python: version of Python.
        versions: {library: version}, of those that are installed.
        device: name of the device.
        unique: what tells this device from others: a GPU's UUID; for a CPU rank its number.
        free: free bytes of the device.
        total: all bytes of the device.
        host_free: available bytes of the node's memory.
        infiniband: names of the node's InfiniBand or RoCE ports.
        peers: whether the GPUs of the node can read each other's memory; None: there is no other.
    """

    host: str
    python: str
    versions: dict[str, str]
    device: str
    unique: str
    free: int
    total: int
    host_free: int
    infiniband: tuple[str, ...]
    peers: bool | None

    @classmethod
    def here(cls, world: World) -> Machine:
        memory = psutil.virtual_memory()
        host = socket.gethostname()
        device, unique = f"{platform.machine()} CPU", f"{host} rank {world.rank}"
        free, total, peers = memory.available, memory.total, None
        if world.device.type == "cuda":
            properties = torch.cuda.get_device_properties(world.device)
            device, unique = properties.name, str(properties.uuid)
            free, total = torch.cuda.mem_get_info(world.device)
            mine = world.device.index
            others = [x for x in range(torch.cuda.device_count()) if x != mine]
            if others:
                peers = all(torch.cuda.can_device_access_peer(mine, other) for other in others)
        return cls(
            host=host,
            python=platform.python_version(),
            versions=_versions(),
            device=device,
            unique=unique,
            free=free,
            total=total,
            host_free=memory.available,
            infiniband=tuple(sorted(x.name for x in Path("/sys/class/infiniband").glob("*"))),
            peers=peers,
        )


def _versions() -> dict[str, str]:
    found = {}
    for name in (*NEEDED, *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def check_machines(world: World) -> list[Finding]:
    """Compare all ranks' machines. A collective; the same findings on every rank."""
    machines: list[Machine] = [Machine.here(world)] * world.size
    dist.all_gather_object(machines, machines[0])
    return [
        _same_versions(machines),
        _devices(machines),
        _memory(machines),
        _links(machines, world.nodes),
        _clocks(world),
    ]


def _same_versions(machines: list[Machine]) -> Finding:
    first = machines[0]
    found = ", ".join(f"{name} {number}" for name, number in first.versions.items())
    found = f"Python {first.python}, {found}"
    without = [name for name in OPTIONAL if name not in first.versions]
    if without:
        found += f"; not installed: {', '.join(without)}"
    for rank, other in enumerate(machines):
        differ = [
            name
            for name in first.versions.keys() | other.versions.keys()
            if first.versions.get(name) != other.versions.get(name)
        ]
        if differ or other.python != first.python:
            what = ", ".join(sorted(differ)) or "Python"
            return Finding(
                "versions",
                found,
                f"rank {rank} ({other.host}) has another {what} than rank 0 ({first.host}): "
                "install the same set on all nodes (constraints.txt)",
            )
    return Finding("versions", found)


def _devices(machines: list[Machine]) -> Finding:
    kinds = sorted({machine.device for machine in machines})
    hosts = list(dict.fromkeys(machine.host for machine in machines))
    found = f"{len(machines)} rank(s) on {len(hosts)} host(s): {', '.join(kinds)}"
    shared = len({machine.unique for machine in machines}) < len(machines)
    if shared:
        return Finding(
            "devices",
            found,
            "two ranks have the same GPU: start as many ranks on a node as CUDA_VISIBLE_DEVICES "
            "shows GPUs",
        )
    if len(kinds) > 1:
        return Finding(
            "devices",
            found,
            "the slowest kind sets the pace, and copies of weights may round differently: take one "
            "kind, or ZeRO-3 or FSDP2 on a 1-D mesh",
            fatal=False,
        )
    return Finding("devices", found)


def _memory(machines: list[Machine]) -> Finding:
    least = min(machines, key=lambda machine: machine.free / machine.total)
    host = min(machine.host_free for machine in machines)
    found = f"free: {least.free / GIB:.1f} of {least.total / GIB:.1f} GiB of the fullest device"
    found += f", {host / GIB:.1f} GiB of the fullest host"
    if least.device.endswith("CPU") or least.free > 0.9 * least.total:
        return Finding("memory", found)
    return Finding(
        "memory",
        found,
        f"something else uses a GPU of {least.host}: nvidia-smi shows what; stop it, or plan with "
        "scalora plan --reserve",
        fatal=False,
    )


def _links(machines: list[Machine], nodes: int) -> Finding:
    ports = sorted({port for machine in machines for port in machine.infiniband})
    peers = [machine.peers for machine in machines if machine.peers is not None]
    found = "GPUs of a node read each other's memory" if peers and all(peers) else "no peer access"
    found += f"; InfiniBand or RoCE: {', '.join(ports) or 'none'}"
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    found += f"; gloo on {interface}" if interface else ""
    if peers and not all(peers):
        return Finding(
            "links",
            found,
            "GPUs of a node reach each other through the host only, which is slow: look for IOMMU "
            "or ACS settings, and at nvidia-smi topo -m",
            fatal=False,
        )
    if nodes > 1 and machines[0].unique.startswith("GPU") and not ports:
        return Finding(
            "links",
            found,
            "NCCL will use TCP between the nodes: in a container, pass /dev/infiniband in",
            fatal=False,
        )
    return Finding("links", found)


def _clocks(world: World) -> Finding:
    """The clocks of all ranks, read right after a barrier."""
    world.sum(0.0)
    now = time.time()
    late, early = world.max(now, -now)
    spread = late + early
    found = f"all within {spread:.1f} s"
    if spread < MOST_CLOCK_SKEW:
        return Finding("clocks", found)
    return Finding(
        "clocks",
        found,
        "set the nodes' clocks by NTP (chrony): TensorBoard and caches order files by time",
        fatal=False,
    )
