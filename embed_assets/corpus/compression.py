"""Reads compressed files as what they hold, within a limit."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow as pa

from embed_assets.corpus.items import BadRow

_MAX_EXPANSION = 1000
"""How many times its own size a file may expand to. Deflate reaches 1,032 times at most; text, about five."""
_LEAST_LIMIT = 64 << 20
"""Bytes that any file may expand to, so that small repetitive ones pass."""


def _zstd(stream: IO[bytes]) -> Any:
    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")


_OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}
COMPRESSIONS = tuple(_OPENERS)
"""File name suffixes."""


def inner_name(name: PurePosixPath) -> PurePosixPath:
    """The name of what a file holds: 'a.csv' for 'a.csv.gz', the file's own if it is not compressed."""
    return name.with_suffix("") if name.suffix.lower() in _OPENERS else name


def decompressed(stream: IO[bytes], suffix: str, size: int) -> IO[bytes]:
    """The content of a compressed file of `size` bytes; the stream itself if the suffix is of no compression.

    Reading raises ``BadRow.Error`` when the file is broken or expands to too much.
    """
    opener = _OPENERS.get(suffix.lower())
    if opener is None:
        return stream
    return io.BufferedReader(_Decompressed(opener(stream), max(_LEAST_LIMIT, size * _MAX_EXPANSION)))


class _Decompressed(io.RawIOBase):
    def __init__(self, stream: Any, limit: int) -> None:
        self._stream, self._left, self._limit = stream, limit, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, pa.ArrowException, OSError) as error:
            raise BadRow.Error("broken_file", f"it can't be decompressed: {error}") from error
        self._left -= len(data)
        if self._left < 0:
            raise BadRow.Error("too_large", f"it expands to more than {self._limit} bytes; split it")
        buffer[: len(data)] = data
        return len(data)
