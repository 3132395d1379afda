"""JSONL, CSV and Parquet: one row, one document, one row in memory at a time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from embed_assets.corpus.encoding import Undecodable, decode
from embed_assets.records import hash_text


@dataclass(frozen=True, slots=True)
class Row:
    """The text of a row, or of a whole file (then `key` is empty)."""

    key: str
    """What tells it from the other rows of its file: its id, else a hash of its text."""
    text: str
    title: str
    media_type: str
    byte_size: int
    metadata: str = "{}"
    place: str = ""
    """Where the row stands in its file, when `key` comes from the id column; empty when it has no id."""

    def named(self, key: str) -> Row:
        """A copy under another key."""
        return replace(self, key=key)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row, or file (then `key` is empty), that could not be read."""

    key: str
    reason: str
    detail: str

    class Error(Exception):
        """Raised by a parser of whole files."""

        def __init__(self, reason: str, detail: str) -> None:
            super().__init__(detail)
            self.row = BadRow("", reason, detail)


def iter_jsonl(
    stream: IO[bytes], text_column: str, id_column: str, title_column: str, max_bytes: int
) -> Iterator[Row | BadRow]:
    """One JSON object per line; blank lines are skipped. Bad lines are named by their 1-based number."""
    for number, line in enumerate(_lines(stream, max_bytes), 1):
        key = f"line{number}"
        if line is None:
            yield BadRow(key, "too_large", f"the line is over EMBED_MAX_FILE_BYTES={max_bytes}")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"), parse_int=_parse_int)
        except UnicodeDecodeError as error:
            yield BadRow(key, "undecodable", f"line {number} is no UTF-8 ({error.reason} at byte {error.start})")
        except (ValueError, RecursionError) as error:
            yield BadRow(key, "invalid_json", f"line {number} is no JSON: {error}")
        else:
            if isinstance(value, dict):
                yield _row(value, key, text_column, id_column, title_column, len(line))
            else:
                yield BadRow(key, "invalid_json", f"line {number} is a JSON {type(value).__name__}, not an object")


def _parse_int(digits: str) -> int | str:
    # Python refuses to parse thousands of digits; as text they can be kept.
    return int(digits) if len(digits) < 1000 else digits


def _lines(stream: IO[bytes], max_bytes: int) -> Iterator[bytes | None]:
    """Lines of at most `max_bytes`; None for a longer one, which is read past in bounded memory."""
    while line := stream.readline(max_bytes + 1):
        if len(line) <= max_bytes or line.endswith(b"\n"):
            yield line
            continue
        while (rest := stream.readline(1 << 20)) and not rest.endswith(b"\n"):
            pass
        yield None


def iter_csv(
    stream: IO[bytes], text_column: str, id_column: str, title_column: str, max_bytes: int
) -> Iterator[Row | BadRow]:
    """Comma-separated rows under a header line; the encoding is told from the file's beginning."""
    head = stream.read(1 << 18)
    try:
        encoding = decode(head[: head.rfind(b"\n") + 1] or head)[1]
    except Undecodable as error:
        yield BadRow("", "undecodable", str(error))
        return
    joined = io.BufferedReader(_Rejoined(head, stream))
    text = io.TextIOWrapper(
        joined, encoding="utf-8-sig" if encoding == "utf-8" else encoding, newline="", errors="strict"
    )
    csv.field_size_limit(max_bytes)
    reader = csv.DictReader(text)
    number = 1
    while True:
        number += 1
        try:
            fields = next(reader)
            if number == 2 and text_column not in (reader.fieldnames or ()):
                yield BadRow("", "missing_text", _no_column(text_column, list(reader.fieldnames or ())))
                return
        except StopIteration:
            if number == 2:
                yield BadRow("", "empty", "there are no rows under the header")
            return
        except csv.Error as error:
            yield BadRow(f"row{number}", "invalid_row", f"row {number}: {error}")
            continue
        except UnicodeDecodeError as error:
            yield BadRow(
                f"row{number}",
                "undecodable",
                f"no {encoding} near row {number} ({error.reason}); the rest was not read",
            )
            return
        if None in fields or None in fields.values():
            yield BadRow(
                f"row{number}",
                "invalid_row",
                f"row {number} has other columns than the header's {len(reader.fieldnames or ())}",
            )
            continue
        size = sum(len(str(value)) for value in fields.values())
        yield _row(dict(fields), f"row{number}", text_column, id_column, title_column, size)


class _Rejoined(io.RawIOBase):
    """A stream whose beginning was read already, from its beginning."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = io.BytesIO(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head.read(len(buffer)) or self._rest.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def iter_parquet(
    stream: IO[bytes], text_column: str, id_column: str, title_column: str, max_bytes: int
) -> Iterator[Row | BadRow]:
    """Rows of a Parquet file, a small batch at a time."""
    number = 0
    try:
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names
        if text_column not in names:
            yield BadRow("", "missing_text", _no_column(text_column, names))
        elif file.metadata.num_rows == 0:
            yield BadRow("", "empty", "the file has no rows")
        else:
            for batch in file.iter_batches(batch_size=256, use_threads=False):
                for fields in batch.to_pylist():
                    number += 1
                    yield _parquet_row(fields, f"row{number}", text_column, id_column, title_column, max_bytes)
    except (pa.ArrowException, UnicodeDecodeError, ValueError, OverflowError) as error:
        after = f" after row {number}; the rest was not read" if number else ""
        yield BadRow(
            f"row{number + 1}" if number else "", "broken_file", f"no Parquet that could be parsed{after}: {error}"
        )


def _parquet_row(
    fields: dict[str, Any], key: str, text_column: str, id_column: str, title_column: str, max_bytes: int
) -> Row | BadRow:
    size = len(str(fields.get(text_column) or "").encode("utf-8", "replace"))
    if size > max_bytes:
        return BadRow(key, "too_large", f"{size} bytes, over EMBED_MAX_FILE_BYTES={max_bytes}")
    return _row(fields, key, text_column, id_column, title_column, size)


def _row(
    fields: dict[str, Any], fallback: str, text_column: str, id_column: str, title_column: str, size: int
) -> Row | BadRow:
    if text_column not in fields:
        return BadRow(fallback, "missing_text", _no_column(text_column, list(fields)))
    text = fields.pop(text_column)
    if text is None:
        return BadRow(fallback, "empty", f"its column {text_column!r} is null")
    if not isinstance(text, str):
        return BadRow(fallback, "missing_text", f"its column {text_column!r} is a {type(text).__name__}, not a string")
    identity = fields.pop(id_column, None)
    title = fields.pop(title_column, None)
    has_id = identity is not None and str(identity) != ""
    key = _printable(identity) if has_id else hash_text(text)[:16]
    # Sorted, so that the order of a row's columns is no change.
    metadata = json.dumps(fields, ensure_ascii=True, sort_keys=True, default=str) if fields else "{}"
    return Row(
        key,
        text,
        _printable(title) if title is not None else "",
        "text/plain",
        size,
        metadata,
        fallback if has_id else "",
    )


def _printable(value: object) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def _no_column(text_column: str, found: list[str]) -> str:
    shown = ", ".join(repr(name) for name in found[:8])
    return f"no column {text_column!r} among {shown or 'none'}; set EMBED_TEXT_COLUMN"
