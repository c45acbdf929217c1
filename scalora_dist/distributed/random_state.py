"""Saves this rank's random generators as tensors: torch's, its device's, Python's and numpy's."""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor


def capture(device: torch.device) -> dict[str, Tensor]:
    """{generator: its state, 1-D uint8 or int64}. The sizes do not depend on what was drawn."""
    _, python, python_next = random.getstate()
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    words, position = numpy["state"]["key"].tolist(), numpy["state"]["pos"]
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([*python, python_next is not None, _bits(python_next or 0.0)]),
        "numpy": torch.tensor([*words, position, numpy["has_gauss"], _bits(numpy["gauss"])]),
    }
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    return states


def restore(states: dict[str, Tensor], device: torch.device) -> None:
    """Set the generators to ``states`` from ``capture``."""
    torch.set_rng_state(states["torch"])
    *python, has_next, bits = states["python"].tolist()
    random.setstate((3, tuple(python), _float(bits) if has_next else None))
    *words, position, has_next, bits = states["numpy"].tolist()
    key = np.array(words, dtype=np.uint32)
    np.random.set_state(("MT19937", key, position, has_next, _float(bits)))
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)


def _bits(number: float) -> int:
    return int(struct.unpack("q", struct.pack("d", number))[0])


def _float(bits: int) -> float:
    return float(struct.unpack("d", struct.pack("q", bits))[0])
