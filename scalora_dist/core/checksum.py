"""Checksums of the bits of tensors, computed on the device where each tensor is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Knuth's multiplier for random numbers modulo 2⁶⁴ (MMIX). It is 5 modulo 8, so its powers are odd
# and repeat only after 2⁶² of them.
BASE = 0x5851F42D4C957F2D
CHUNK = 2**20  # elements that are widened to int64 at a time: twice 8 MiB, which fits a GPU's cache


def bits(values: Tensor) -> Tensor:
    """A view of a 1-D tensor's bits as integers of at most 32 bits."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
    return values.view(integers[values.element_size()])


@torch.no_grad()
def checksums(tensors: Sequence[Tensor], chunk: int = CHUNK) -> Tensor:
    """The checksum of each tensor: Σ bits[i] · BASEⁱ modulo 2⁶⁴, (tensors,) int64 on the CPU.

    The sum is exact, so it does not depend on the order of additions or on ``chunk``. It always
    sees one changed element, because a power is odd. Up to 2³¹ elements, it always sees two
    elements that changed places: the powers' difference has at most 32 factors of 2, the elements'
    difference at most 31. No communication.

    Args:
        tensors: 1-D, any dtype, each on any device.
        chunk: number of elements that are widened to int64 at a time.
    """
    views = [bits(tensor) for tensor in tensors]
    longest = max((view.numel() for view in views), default=0)
    sums = torch.zeros(len(views), dtype=torch.int64)
    for device in {view.device for view in views}:
        powers = _powers(BASE, min(chunk, longest), device)
        starts = _powers(pow(BASE, chunk, 2**64), longest // chunk + 1, device)
        here = [i for i, view in enumerate(views) if view.device == device]
        found = [_checksum(views[i].split(chunk), powers, starts) for i in here]
        sums[here] = torch.stack(found).cpu()  # the only wait for the device
    return sums


def _checksum(parts: Sequence[Tensor], powers: Tensor, starts: Tensor) -> Tensor:
    """The checksum of a tensor in ``parts`` that begin at the powers ``starts``: a scalar."""
    sums = torch.stack([(part * powers[: len(part)]).sum() for part in parts])
    return (sums * starts[: len(sums)]).sum()


def _powers(base: int, count: int, device: torch.device) -> Tensor:
    """base⁰, base¹, … modulo 2⁶⁴, (count,) int64."""
    signed = base - 2**64 if base >= 2**63 else base
    powers = torch.full((count,), signed, dtype=torch.int64, device=device)
    powers[:1] = 1
    return powers.cumprod(0)
