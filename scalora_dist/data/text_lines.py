"""Reads the lines of a UTF-8 text file, plain or compressed."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.compression import compr
from fsspec.utils import infer_compression

from scalora_dist.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def read_lines(path: Path, label: str) -> Iterator[str]:
    """Yield the lines with their line breaks, without a byte order mark.

    Only "\\n" ends a line: U+2028 and others may stand inside a JSON string.

    Args:
        label: the file's name in messages.

    Raises:
        UserError: a line is not UTF-8, or a .zst file without its module.
        Exception: the file or the archive is broken; each library has its own types.
    """
    with path.open("rb") as file:
        for number, line in enumerate(_decompress(file, path, label), start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{label}, line {number}: this is not UTF-8 text.") from None
            yield text.removeprefix("\ufeff") if number == 1 else text


def _decompress(file: BinaryIO, path: Path, label: str) -> Any:
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED:
        return file
    if suffix != ".zst":
        return compr[infer_compression(path.name)](file, mode="rb")
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{label} needs zstandard: pip install zstandard.") from None
    # The widest window that `zstd --long=31` writes; by default such files are refused.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    return io.BufferedReader(_ZstdReader(file, decompressor.decompressobj))


class _ZstdReader(io.RawIOBase):
    """Decompresses all frames of a .zst file.

    The reader of fsspec and zstandard takes the end of a file that was cut off for a good end, and
    older versions stop after the first frame. Either would lose examples without an error.
    """

    def __init__(self, file: BinaryIO, new_frame: Callable[[], Any]) -> None:
        self._file = file
        self._new_frame = new_frame
        self._frame: Any = None
        self._compressed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._compressed = self._compressed or self._file.read(io.DEFAULT_BUFFER_SIZE)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the archive is cut off")
                return 0
            self._frame = self._frame or self._new_frame()
            self._plain = memoryview(self._frame.decompress(self._compressed))
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._plain))
        buffer[:size] = self._plain[:size]
        self._plain = self._plain[size:]
        return size
