"""Writes a safetensors file one tensor at a time. The library needs all tensors in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class SafetensorsWriter:
    """Writes one safetensors file: first a JSON header, then the tensors' bytes in order."""

    def __init__(
        self,
        file: BinaryIO,
        entries: Mapping[str, tuple[torch.Size, torch.dtype]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            file: the open file.
            entries: {name: (shape, dtype)} in the order of the later calls of ``write``.
            metadata: {key: text} for the header.
        """
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        end = 0
        for name, (shape, dtype) in entries.items():
            start, end = end, end + shape.numel() * dtype.itemsize
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # align the data to 8 bytes
        file.write(len(text).to_bytes(8, "little") + text)
        self.file = file

    def write(self, tensor: Tensor) -> None:
        self.file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
