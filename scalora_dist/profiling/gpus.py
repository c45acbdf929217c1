"""Memory and speed of GPUs, from their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

NVIDIA = "https://www.nvidia.com/en-us/data-center/"


@dataclass(frozen=True)
class Gpu:
    """Data of one GPU.

    Attributes:
        name: words of the device name that torch reports.
        memory_gib: memory that a program can use, GiB, as drivers report it (data sheets say GB).
        bandwidth: memory bandwidth, bytes/s.
        tflops: 10¹² bfloat16 operations/s with sums in float32, dense (data sheets often give
            twice that, for sparse matrices).
        link: bandwidth to another GPU of the node, bytes/s in one direction: NVLink, else PCIe.
        bus: bandwidth to the host's memory, bytes/s in one direction: of 16 lanes of PCIe, 32e9 in
            generation 4 and 64e9 in generation 5 (data sheets often give both directions' sum).
        source: URL of the figures.
    """

    name: str
    memory_gib: float
    bandwidth: float
    tflops: float
    link: float
    bus: float
    source: str


GPUS = {
    "a10g-24g": Gpu("A10G", 22.0, 600e9, 70, 32e9, 32e9, "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf"),
    "l4-24g": Gpu("L4", 22.0, 300e9, 121, 32e9, 32e9, NVIDIA + "l4/"),
    "rtx3090-24g": Gpu("RTX 3090", 23.7, 936e9, 71, 32e9, 32e9, "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"),
    "rtx4090-24g": Gpu("RTX 4090", 23.6, 1008e9, 165.2, 32e9, 32e9, "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"),
    "a6000-48g": Gpu("RTX A6000", 47.5, 768e9, 154.8, 56e9, 32e9, "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"),
    "l40s-48g": Gpu("L40S", 44.5, 864e9, 362, 32e9, 32e9, NVIDIA + "l40s/"),
    "a100-40g": Gpu("A100-SXM4-40GB", 39.4, 1555e9, 312, 300e9, 32e9, NVIDIA + "a100/"),
    "a100-80g": Gpu("A100-SXM4-80GB", 79.2, 2039e9, 312, 300e9, 32e9, NVIDIA + "a100/"),
    "h100-80g": Gpu("H100 80GB HBM3", 79.1, 3350e9, 989.4, 450e9, 64e9, NVIDIA + "h100/"),
    "h100-pcie-80g": Gpu("H100 PCIe", 79.1, 2000e9, 756, 64e9, 64e9, NVIDIA + "h100/"),
    "h200-141g": Gpu("H200", 139.8, 4800e9, 989.4, 450e9, 64e9, NVIDIA + "h200/"),
    "b200-180g": Gpu("B200", 178.4, 7700e9, 2250, 900e9, 64e9, NVIDIA + "dgx-b200/"),
    "mi300x-192g": Gpu("MI300X", 191.5, 5300e9, 1307.4, 64e9, 64e9, "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"),
}  # fmt: skip


def find_gpu(name: str) -> Gpu | None:
    """The GPU with a key of ``GPUS`` or a device name as torch reports it; None: not known.

    "NVIDIA H100 80GB HBM3" and "h100-80g" are the same. If two GPUs fit,
    the one with the longer name counts.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    words = _words(name)
    fitting = [gpu for gpu in GPUS.values() if _words(gpu.name) <= words]
    if words & {"nvl", "ti", "d", "laptop", "super"}:  # another card with a similar name
        return None
    return max(fitting, key=lambda gpu: len(gpu.name), default=None)


def _words(name: str) -> set[str]:
    return set(re.split(r"[\s-]+", name.lower()))
