"""Opens files of lines: their encoding by their start, the rest as a stream."""

from __future__ import annotations

import io
import re
from typing import IO, Any

from embed_assets.corpus.encoding import DamagedUtf8, byte_order_mark, decode

SAMPLE_BYTES = 1 << 18
"""From the start of a file, to determine its encoding. More would make it surer, at that much more memory."""
STRAY_BYTE = re.compile("[\udc80-\udcff]")
"""What a byte that is not text in the file's encoding is read as."""


def encoding_of(head: bytes) -> str:
    """The encoding of a file of lines, from its start. Raises ``Undecodable`` if it can't be told."""
    try:
        # Without a byte order mark only whole lines are decoded: the sample may end inside a character.
        if b"\0" in head:  # UTF-16, perhaps without its mark
            return byte_order_mark(head) or decode(head[: len(head) // 2 * 2])[1]
        return byte_order_mark(head) or decode(head[: head.rfind(b"\n") + 1] or head)[1]
    except DamagedUtf8:
        return "utf-8"


def text_of(head: bytes, rest: IO[bytes], encoding: str, newline: str) -> io.TextIOWrapper:
    """The file as text. Where an encoding is one of single bytes, or UTF-8, stray bytes are read as `STRAY_BYTE`."""
    errors = "strict" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
    data = io.BufferedReader(PrefixedStream(head, rest))
    return io.TextIOWrapper(data, encoding=encoding, newline=newline, errors=errors)


class PrefixedStream(io.RawIOBase):
    """A stream whose first bytes were already read, put back together."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = io.BytesIO(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head.read(len(buffer)) or self._rest.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
