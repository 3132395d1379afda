"""Reads JSONL, without holding a whole file in memory, and JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Protocol

from embed_assets.corpus.encoding import Undecodable, decode
from embed_assets.corpus.items import BadRow, Row
from embed_assets.corpus.line_files import SAMPLE_BYTES, PrefixedStream, encoding_of, text_of
from embed_assets.corpus.options import ParseOptions
from embed_assets.corpus.rows import build_row, text_bytes, value_of

_MAX_BRACKETS = 3_000_000
"""Opening brackets in a JSON line. An empty list takes 56 bytes of memory, thirty times its text: 170 MB in all."""
_MAX_INT_DIGITS = 1000
"""Longer integers stay text: Python refuses to parse more than 4,300 digits."""
_SKIP_BYTES = 1 << 20
"""Read at a time of a line that is too long. More would take fewer reads and more memory."""


def iter_jsonl(stream: IO[bytes], options: ParseOptions) -> Iterator[Row | BadRow]:
    """Rows of a JSONL file, one JSON object per line. Blank lines are skipped; bad ones are keyed by 1-based number."""
    head = stream.read(SAMPLE_BYTES)
    try:
        encoding = encoding_of(head)
    except Undecodable:
        encoding = "utf-8"  # the lines say which of them are not
    lines: _Lines = io.BufferedReader(PrefixedStream(head, stream))
    if encoding != "utf-8":
        lines = _Recoded(text_of(head, stream, encoding, newline="\n"))
    number = 0
    try:
        for number, line in enumerate(_lines(lines, options.max_file_bytes), 1):
            if line is None or line.strip():
                yield _json_row(line, number, options)
    except UnicodeDecodeError as error:
        detail = f"line {number + 1} is not {encoding} ({error.reason}); the rest of the file was not read"
        yield BadRow(f"line{number + 1}", "undecodable", detail)


def iter_json(stream: IO[bytes], options: ParseOptions) -> Iterator[Row | BadRow]:
    """Rows of a JSON file: of an array of objects, or of an object that holds one; else the object is the only row.

    Unlike the other formats of rows, the file is in memory as a whole. One of JSON lines is read as such.
    """
    data = stream.read(options.max_file_bytes + 1)
    if len(data) > options.max_file_bytes:
        detail = f"over EMBED_MAX_FILE_BYTES={options.max_file_bytes}; write it as JSON Lines, which may be larger"
        yield BadRow("", "too_large", detail)
        return
    if (brackets := data.count(b"[") + data.count(b"{")) > _MAX_BRACKETS:
        yield BadRow("", "too_large", f"it has {brackets} brackets, over {_MAX_BRACKETS}")
        return
    try:
        value = json.loads(decode(data)[0], parse_int=_parse_int)
    except Undecodable as error:
        yield BadRow("", "undecodable", str(error))
        return
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):
            yield from iter_jsonl(io.BytesIO(data), options)
        else:
            yield BadRow("", "invalid_json", f"it is not JSON: {error}")
        return
    rows = _rows_of_json(value, options)
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield build_row(row, f"row{number}", text_bytes(row, options), options)
        else:
            yield BadRow(f"row{number}", "invalid_json", f"row {number} is a JSON {type(row).__name__}, not an object")


def _rows_of_json(value: Any, options: ParseOptions) -> list[Any]:
    if isinstance(value, dict) and value_of(value, options.text_column) is None:
        inside = [each for each in value.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
        return inside[0] if len(inside) == 1 else [value]
    return value if isinstance(value, list) else [value]


def _json_row(line: bytes | None, number: int, options: ParseOptions) -> Row | BadRow:
    """The row of a line; None is one that is too long."""
    key = f"line{number}"
    if line is None:
        return BadRow(key, "too_large", f"the line is over EMBED_MAX_FILE_BYTES={options.max_file_bytes}")
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    if (brackets := line.count(b"[") + line.count(b"{")) > _MAX_BRACKETS:
        return BadRow(key, "too_large", f"line {number} has {brackets} brackets, over {_MAX_BRACKETS}")
    try:
        value = json.loads(line.decode("utf-8"), parse_int=_parse_int)
        if isinstance(value, dict):
            return build_row(value, key, len(line), options)
    except UnicodeDecodeError as error:
        return BadRow(key, "undecodable", f"line {number} is not UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:
        return BadRow(key, "invalid_json", f"line {number} is not JSON: {error}")
    return BadRow(key, "invalid_json", f"line {number} is a JSON {type(value).__name__}, not an object")


class _Lines(Protocol):
    """A file of lines."""

    def readline(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class _Recoded:
    """The lines of a text as UTF-8."""

    text: io.TextIOWrapper

    def readline(self, size: int, /) -> bytes:
        """The next line, or so many characters of it."""
        return self.text.readline(size).encode("utf-8", "surrogateescape")


def _parse_int(digits: str) -> int | str:
    return int(digits) if len(digits) < _MAX_INT_DIGITS else digits


def _lines(stream: _Lines, max_bytes: int) -> Iterator[bytes | None]:
    """Lines of at most `max_bytes`, with their line ends; None for a longer one, which is skipped in bounded memory."""
    while line := stream.readline(max_bytes + 1):
        if len(line) <= max_bytes or line.endswith(b"\n"):
            yield line
            continue
        while (rest := stream.readline(_SKIP_BYTES)) and not rest.endswith(b"\n"):
            pass
        yield None
